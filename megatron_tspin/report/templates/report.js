const dark = window.matchMedia("(prefers-color-scheme: dark)");

function neutralColours() {
  const style = getComputedStyle(document.documentElement);
  return { text: style.getPropertyValue("--muted").trim(), ground: style.getPropertyValue("--card").trim(),
           ink: style.getPropertyValue("--ink").trim() };
}

function themed(layout) {
  const colours = neutralColours();
  const annotations = (layout.annotations || []).map((note) => ({ ...note, font: { ...note.font, color: colours.text } }));
  return {
    ...layout, annotations, font: { ...layout.font, color: colours.text },
    hoverlabel: { ...layout.hoverlabel, bgcolor: colours.ground, font: { size: 12, color: colours.ink } },
  };
}

function draw() {
  for (const source of document.querySelectorAll("script.figure")) {
    const figure = JSON.parse(source.textContent);
    const options = { responsive: true, displaylogo: false, displayModeBar: true,
                      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
    Plotly.react(source.dataset.plot, figure.data, themed(figure.layout), options);
  }
}

draw();
dark.addEventListener("change", draw);
