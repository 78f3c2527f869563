"""Whether transformers loads an HF folder that was written here."""

from pathlib import Path

import torch
from safetensors import safe_open

from megatron_tspin.checkpoint.weight_files import weight_files
from megatron_tspin.errors import InputError


def check_loads(folder: Path) -> None:
    """Demands that transformers reads the folder's configs, and that its model has just the tensors of the folder.

    The model is built without memory for its weights, so that this takes a second for any size.

    Raises:
        InputError: It does not; says what transformers said, or which tensors differ.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.core_model_loading import revert_weight_conversion

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            memory = model.state_dict()
            stored = revert_weight_conversion(model, memory)  # under the names that files have
            tied_names = getattr(model, "all_tied_weights_keys", None) or () if config.tie_word_embeddings else ()
            # Tied tensors are one tensor for transformers, whichever of the names a file has.
            tied = set(revert_weight_conversion(model, {name: memory[name] for name in tied_names}))
    except Exception as error:  # the loaders raise whatever their parsers raise
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: transformers cannot load the export: {type(error).__name__}: {reason}") from error
    written = {name: shape for path in weight_files(folder) for name, shape in _shapes(path).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    differing = sorted(
        name
        for name in {*written, *wanted}
        if written.get(name) != wanted.get(name) and not (name in tied and name not in written)
    )
    if differing:
        raise InputError(
            f"{folder}: transformers' model has other tensors than the export: {', '.join(differing[:10])}"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
