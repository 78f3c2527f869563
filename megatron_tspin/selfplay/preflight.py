"""Everything that can be known to be wrong before a stage starts, in one report. Writes nothing, imports no torch."""

import ast
import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_tspin.config import CHAT_TEMPLATE, Config
from megatron_tspin.data.splits import Split, splits_of
from megatron_tspin.data.tokenizer_loading import largest_token_id, refuse_added_tokens, tokenizer_file
from megatron_tspin.errors import InputError
from megatron_tspin.generation.backends.vllm_process import python_of, version_of
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.objective.packing import row_packing
from megatron_tspin.objective.roles import stored_roles
from megatron_tspin.run_folder import HELD_OUT, TRAIN
from megatron_tspin.selfplay.disk_space import check_disk_space
from megatron_tspin.selfplay.plan import scorer_file
from megatron_tspin.selfplay.weights import check_weights
from megatron_tspin.storage import read_json

_CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def preflight(config: Config) -> None:
    """Checks the examples, the HF checkpoint, the layouts, the tokenizer, the scorer, the engine and the disk space.

    Raises:
        InputError: All that is wrong, one line each.
    """
    checks = (
        _check_run_dir,
        _check_examples,
        _check_held_out,
        _check_model,
        _check_rows,
        _check_tokenizer,
        _check_scorer,
        _check_engine,
        check_disk_space,
    )
    problems = [problem for check in checks for problem in _problems(check, config)]
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def _problems(check: Callable[[Config], None], config: Config) -> list[str]:
    try:
        check(config)
    except InputError as error:
        return str(error).splitlines()
    return []


def _check_run_dir(config: Config) -> None:
    """The run's folder is there or can be made, and can be written to."""
    folder = Path(config.run_dir)
    for place in (folder, *folder.parents):
        if not os.path.lexists(place):
            continue
        if not place.exists():
            raise InputError(f"{folder}: {place} is a link to nothing; name another --run-dir, or remove the link")
        if not place.is_dir():
            raise InputError(f"{folder}: {place} is a file, so the run has no folder there; name another --run-dir")
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(
                f"{folder}: {place} cannot be written to; name another --run-dir, or change its permissions"
            )
        return


def _check_examples(config: Config) -> None:
    _read_through(splits_of(config.data)[TRAIN])


def _check_held_out(config: Config) -> None:
    split = splits_of(config.data).get(HELD_OUT)
    if split is not None:
        _read_through(split)


def _read_through(split: Split) -> None:
    """Checks every example, keeping none."""
    deque(split(), maxlen=0)


def _check_model(config: Config) -> None:
    folder = Path(config.model.hf_checkpoint)
    architecture: Architecture | None = None
    problems: list[str] = []
    try:
        architecture = read_architecture(folder)
    except InputError as error:
        problems += str(error).splitlines()
    if folder.is_dir():
        problems += _problems(lambda config: check_weights(folder, architecture), config)
    if architecture is not None:
        problems += _layout_problems(architecture, config)
        check_length = architecture.check_length
        problems += _problems(lambda config: check_length(config.data.seq_length), config)
    if problems:
        raise InputError("\n".join(problems))


def _layout_problems(architecture: Architecture, config: Config) -> Iterator[str]:
    training, generation = config.parallel, config.generation_layout()
    for layout in dict.fromkeys((training, generation)):
        try:
            architecture.check_layout(layout, training=layout == training)
        except InputError as error:
            place = " (generation's layout)" if layout != training else ""
            yield from (f"{line}{place}" for line in str(error).splitlines())
    yield from _problems(lambda config: architecture.check_precision(training, config.precision), config)


def _check_rows(config: Config) -> None:
    """A packed row holds any triplet that the run may come to, so that it does not stop after its first rollout."""
    packing, training = row_packing(config), config.training
    if packing is None or training.row_capacity is None or training.over_capacity == "truncate":
        return
    roles, longest = len(stored_roles(config.objective.method)), config.data.seq_length
    if packing.share_prompts:  # the annotated response has what seq_length leaves, the others are generated
        needed = longest + (roles - 1) * config.generation.max_new_tokens - roles
    else:
        needed = roles * (longest - 1)
    if needed > packing.capacity:
        raise InputError(
            f"training.row_capacity = {training.row_capacity} does not hold every triplet that the run may come to: "
            f"with data.seq_length = {longest} and generation.max_new_tokens = {config.generation.max_new_tokens} up "
            f"to {needed} tokens; raise --tspin-row-capacity, or let --tspin-over-capacity truncate cut responses"
        )


def _check_tokenizer(config: Config) -> None:
    """The tokenizer is there, and each of its ids has a row in the embedding."""
    checkpoint = Path(config.model.hf_checkpoint)
    location = Path(config.model.tokenizer or config.model.hf_checkpoint)
    if not location.exists():
        raise InputError(f"{location}: no such tokenizer; model.tokenizer must be a folder or a SentencePiece model")
    source = tokenizer_file(location)
    refuse_added_tokens(source)
    largest = largest_token_id(source)
    unknown = [stop for stop in config.generation.stop if stop.isdecimal() and int(stop) > largest]
    if unknown:
        raise InputError(f"generation.stop: {', '.join(unknown)}: no ids of {source}, whose largest is {largest}")
    if config.data.template == CHAT_TEMPLATE:
        _check_chat_template(source)
    if not (checkpoint / "config.json").is_file():
        return  # reported with the model
    architecture = read_json(checkpoint / "config.json")
    vocab_size = architecture.get("vocab_size") if isinstance(architecture, dict) else None
    if isinstance(vocab_size, int) and largest >= vocab_size:
        raise InputError(
            f"{source}: its largest token id is {largest}, but vocab_size in {checkpoint / 'config.json'} is "
            f"{vocab_size}; set --tokenizer-model to the tokenizer of this checkpoint"
        )


def _check_chat_template(source: Path) -> None:
    """The tokenizer has a chat template; what it says is for transformers to find out."""
    folder, settings = source.parent, source.with_name("tokenizer_config.json")
    remedy = "set --template to a text with {prompt}"
    if source.suffix == ".model":
        raise InputError(f"{source}: data.template is `{CHAT_TEMPLATE}`, but SentencePiece models have none; {remedy}")
    if any((folder / name).is_file() for name in _CHAT_TEMPLATE_FILES):
        return
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    if not found:
        raise InputError(
            f"{folder}: data.template is `{CHAT_TEMPLATE}`, but the tokenizer has no chat template; {remedy}"
        )
    if not isinstance(found, list):  # one text; a list has several, by name
        return
    names = [str(named.get("name")) for named in found if isinstance(named, dict)]
    if "default" not in names:
        raise InputError(
            f"{settings}: data.template is `{CHAT_TEMPLATE}`, but of the chat templates {', '.join(names)} none is "
            f"`default`; {remedy}"
        )


def _check_scorer(config: Config) -> None:
    """The scorer's function is defined where it is said to be. Its code is parsed, not run."""
    scorer = config.evaluation.scorer
    if scorer is None:
        return
    place, _, function = scorer.rpartition(":")
    if not place or not function.isidentifier():
        raise InputError(f"evaluation.scorer = {scorer!r}: expected `path/to/file.py:function` or `module:function`")
    for path in scorer_file(config):
        _check_function(path, function)
        return
    top = place.partition(".")[0]
    if not top.isidentifier() or importlib.util.find_spec(top) is None:
        raise InputError(f"evaluation.scorer = {scorer!r}: there is no module {top}; install it, or name a .py file")


def _check_engine(config: Config) -> None:
    """VLLM is there where the stages start a server of it on this host; named servers are waited for."""
    generation = config.generation
    if generation.engine == "vllm" and not generation.server_urls and config.launch.launcher == "local":
        version_of(python_of(generation.vllm_python))


def _check_function(path: Path, function: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; evaluation.scorer must name the scorer's file")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', None) or 1}: not valid Python: {error}") from error
    names = _defined_names(tree)
    if function not in names:
        raise InputError(f"{path}: defines no function {function!r}; it has {', '.join(names) or 'none'}")


def _defined_names(tree: ast.Module) -> list[str]:
    """Names that a module's top level binds to something that may be called."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names
