# SPDX-License-Identifier: MIT
"""Train a model on a sequence that lies on all processes:

torchrun --nproc_per_node 2 examples/sequence_parallel.py
"""

import torch
import torch.distributed as dist

from fla.distributed import reduce_gradients, sequence_parallel, shard_sequence
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same model on every process
    config = GatedDeltaNetConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_heads=2, head_dim=64
    )
    model = GatedDeltaNetForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = (torch.arange(4097) * 7 % 251)[None].to(device)
    bounds = torch.tensor([0, 1500, 4097])  # two documents; the second lies on both processes
    for step in range(5):
        own = shard_sequence(tokens)
        with sequence_parallel():
            loss = model(own, labels=own, cu_seqlens=bounds).loss  # of all tokens
            loss.backward()
        reduce_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}  {own.shape[1]} of {tokens.shape[1]} tokens here  loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
