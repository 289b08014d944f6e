"""Small stand-ins for the pipeline: what an engine must carry, without video or model."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist


def adds(config, group, log):
    """Each rank gives rank + 1; all must see the same sum."""
    log.stage("add")
    mine = torch.tensor([dist.get_rank(group) + 1.0])
    dist.all_reduce(mine, group=group)
    log.progress(1, 1)
    log.line("added")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    print("a library prints on standard output")
    return {
        "schedule": "ring",
        "frames": 2,
        "tokens_before": 512,
        "tokens_after": 51,
        "tokens_local": 10 + rank,
        "cache_bytes": 100 * (rank + 1),
        "bytes_sent": {(rank + 1) % world: 7} if world > 1 else {},
        "generated_ids": [int(mine.item()), config.generate.seed],
        "text": f"sum {int(mine.item())}",
        "notes": ["nothing was watched"],
        "warnings": [],
        "verify": {
            "max_logit_diff": config.output.tolerance * 2,
            "tolerance": config.output.tolerance,
            "same_tokens": True,
        }
        if config.output.verify
        else None,
    }


def raises_on_2(config, group, log):
    """Rank 2 goes wrong; the others wait for it in a collective."""
    log.stage("fail")
    if dist.get_rank(group) == 2:
        raise ValueError("frame 7 is bad,\nas said")
    dist.all_reduce(torch.zeros(1), group=group)
    return {}


def raises_on_1_while_others_are_busy(config, group, log):
    """Rank 1 goes wrong; the others never look at their peers."""
    if dist.get_rank(group) == 1:
        raise RuntimeError("lost")
    time.sleep(60)
    return {}


def killed_on_1(config, group, log):
    """Rank 1 dies without a word."""
    if dist.get_rank(group) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1), group=group)
    return {}


def hangs(config, group, log):
    """Never ends."""
    log.stage("forever")
    time.sleep(600)
    return {}


def exits(config, group, log):
    """Leaves through the back door."""
    sys.exit(3)


if __name__ == "__main__":
    # The command `tokenring`, with one of the functions above in the pipeline's place: fake_entries.py NAME run ...
    from launch.cli import main

    sys.exit(main(sys.argv[2:], entry=f"tests.launch.fake_entries:{sys.argv[1]}"))
