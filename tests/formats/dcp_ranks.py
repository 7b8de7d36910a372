"""Writes a DCP checkpoint from several processes: `python dcp_ranks.py FOLDER RANK WORLD PORT`.

Shards of every kind: rows, columns, both, uneven, a rank without rows, replicas; and the same tensors whole, in
`whole.pt`, from rank 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main(folder: Path, rank: int, world: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "model"))
    generator = torch.Generator().manual_seed(0)
    whole = {
        "rows.weight": torch.randn(12, 5, generator=generator),
        "uneven.weight": torch.randn(5, 3, generator=generator),
        "one_row.weight": torch.randn(1, 4, generator=generator),
        "columns.weight": torch.randn(4, 12, generator=generator),
        "both.weight": torch.randn(8, 12, generator=generator),
        "replica.weight": torch.randn(3, 3, generator=generator),
        "half.weight": torch.randn(12, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(4.0),
    }
    placements = {
        "rows.weight": (flat, [Shard(0)]),
        "uneven.weight": (flat, [Shard(0)]),
        "one_row.weight": (flat, [Shard(0)]),
        "columns.weight": (flat, [Shard(1)]),
        "both.weight": (grid, [Shard(0), Shard(1)]),
        "replica.weight": (flat, [Replicate()]),
        "half.weight": (grid, [Replicate(), Shard(0)]),
        "scalar": (flat, [Replicate()]),
    }
    model = {name: distribute_tensor(tensor, *placements[name]) for name, tensor in whole.items()}
    optimizer = {f"state.{name}.exp_avg": tensor for name, tensor in model.items()}
    dcp.save({"model": model, "optimizer": optimizer, "train_state": {"step": 3}}, checkpoint_id=folder)
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
