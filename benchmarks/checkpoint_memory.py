"""Host memory that saving and loading a training checkpoint takes on each rank, above what training holds.

Two ranks, data parallel, the distributed optimizer, bf16, RMSProp, a Llama of 74 M parameters with random weights:

    torchrun --nproc-per-node 2 benchmarks/checkpoint_memory.py FOLDER
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tspin.benchmark.memory import PeakMemory
from megatron_tspin.checkpoint.store import load_checkpoint, save_checkpoint
from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config
from megatron_tspin.models.build import build_policy
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.parallel import Topology, distributed
from megatron_tspin.training.loop import Trainer, build_trainer
from megatron_tspin.training.optimizer import gradient_norm, update

_ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Prints a line a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder for the model's config and the checkpoint")
    folder: Path = parser.parse_args().folder
    hf = folder / "hf"
    hf.mkdir(parents=True, exist_ok=True)
    (hf / "config.json").write_text(json.dumps(_ARCHITECTURE))
    config = load_config(None, _settings(hf))
    with distributed(config.parallel) as topology:
        print_in_turn(_measure(config, topology, folder / "checkpoint"), topology)


def _settings(hf: Path) -> dict[str, Any]:
    return {
        "run_dir": "unused",
        "model.hf_checkpoint": str(hf),
        "data.annotated": "unused",
        "data.seq_length": 64,
        "generation.max_new_tokens": 16,
        "parallel.data_parallel_size": 2,
        "parallel.use_distributed_optimizer": True,
        "precision.bf16": True,
    }


def _measure(config: Config, topology: Topology, checkpoint: Path) -> str:
    trainer = _trainer_after_a_step(config, topology)
    saving = PeakMemory()
    save_checkpoint(checkpoint, trainer.whole_policy(), topology, trainer.optimizer)
    written = saving.peak_mib()
    loading = PeakMemory()
    load_checkpoint(checkpoint, trainer.whole_policy(), topology, trainer.optimizer)
    size = (checkpoint / f"__{topology.rank}_0.distcp").stat().st_size / 2**20
    return (
        f"rank {topology.rank}: saving {written:.0f} MiB, loading {loading.peak_mib():.0f} MiB above "
        f"{saving.held_mib:.0f} MiB held; its file {size:.0f} MiB ({saving.method})"
    )


def _trainer_after_a_step(config: Config, topology: Topology) -> Trainer:
    architecture = read_architecture(Path(config.model.hf_checkpoint))
    model = build_policy(architecture, config.parallel, config.training, config.precision, topology)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    trainer = build_trainer(config, 0, topology, model, 1)
    for parameter in trainer.ddp.parameters():
        parameter.main_grad.fill_(0.01)
    update(trainer.optimizer, gradient_norm(trainer.optimizer), 1e-5, 0.0)
    return trainer


def print_in_turn(line: str, topology: Topology) -> None:
    """Prints each rank's line, in the order of the ranks."""
    for rank in range(topology.world_size):
        if rank == topology.rank:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        dist.barrier()


if __name__ == "__main__":
    main()
