"""Whether a config.json was understood as transformers understands it: a checkpoint's authors ran it there."""

from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.hf_config import read_config


def check_reading(architecture: Architecture) -> None:
    """Demands that the config as transformers holds it in memory means the same as the file.

    Two keys that state one fact in two ways, values of odd types and defaults of versions all show here.

    Raises:
        InputError: transformers refuses the file, or reads another value; names each fact with both values.
    """
    from transformers import AutoConfig

    path = architecture.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(architecture.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders raise whatever their validators raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: transformers refuses it: {type(error).__name__}: {reason}") from error
    theirs = read_config(config.to_dict(), path)
    differing = [
        f"{path}: {name} is {ours!r} as read here, {their!r} for transformers; let the file say it once"
        for name, (ours, their) in architecture.differences(theirs).items()
    ]
    if differing:
        raise InputError("\n".join(differing))
