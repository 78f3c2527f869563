// An error in a script is shown in the page: a missing figure must not look like a missing measurement.
function showError(message) {
  const box = document.getElementById("script-errors");
  box.hidden = false;
  box.querySelector("span").append(message + " ");
}
window.addEventListener("error", (event) => showError(event.message));
window.addEventListener("unhandledrejection", (event) => showError(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => showError("refused: " + event.violatedDirective));
