"""Inputs of one decode step and its float64 result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from oracles import attention_oracle, decode_oracle, rotate_oracle, visible_oracle
from transformers_gsrq.ops.triton import Count

PAGE = 64


@dataclass
class Case:
    """Shape of a decode step; the names are those of `decode_attention`.

    What a step must not look at is NaN: slots of sinks and of the ring that hold nothing. Behind the last code lie
    others.
    """

    batch: int = 1
    heads: int = 2
    groups: int = 2
    queries: int = 1
    head_dim: int = 64
    key_subspace: int = 64
    value_subspace: int = 64
    key_stages: int = 3
    value_stages: int = 3
    tokens: int | list[int] = 65
    capacity: int = 0
    sink_length: int = 4
    window: int = 9
    ring: int = 0
    ring_head: int = 0
    rotary_dim: int | None = None
    factor: float = 1.0
    softcap: float | None = None
    padding: list[int] = field(default_factory=list)
    masked: str = ""
    paged: bool = False
    first_position: int = 4
    peaked: bool = False
    dtype: torch.dtype = torch.float16

    def build(self, device: str = "cpu", seed: int = 0) -> dict:
        """Arguments of a decode step under the names of `decode_attention`, and `centroids` of keys and values."""
        make = torch.Generator(device="cpu").manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=make)

        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        width = self.heads * self.head_dim
        tokens = torch.tensor([self.tokens] * self.batch if isinstance(self.tokens, int) else self.tokens)
        capacity = self.capacity or (int(tokens.max()) // PAGE + 2) * PAGE
        ring = self.ring or self.window + self.queries + 3
        padding = torch.tensor(self.padding or [0] * self.batch)
        zeros = torch.zeros(self.batch, dtype=torch.long)
        counts = {
            Count.NUM_CODES: tokens,
            Count.FIRST_CODE: padding.minimum(tokens),
            Count.FIRST_POSITION: self.first_position - padding,
            # Rows with padding keep one slot of sinks fewer, to see that counts are honoured.
            Count.NUM_SINKS: self.sink_length - (padding > 0).int() * bool(self.sink_length),
            Count.FIRST_TOKEN: padding,
            Count.NUM_STORED: self.sink_length + tokens,
            Count.RING_HEAD: zeros + self.ring_head,
            Count.NUM_EXACT: zeros + self.window,
        }
        codes, centroids = [], []
        for subspace, stages in (
            (self.key_subspace, self.key_stages), (self.value_subspace, self.value_stages)
        ):  # fmt: skip
            shape = (self.batch, width // subspace, stages, capacity)
            codes.append(torch.randint(0, 256, shape, generator=make, dtype=torch.uint8))
            centroids.append((random(width // subspace, stages, 256, subspace) * stages**-0.5).to(self.dtype))
        block_table = None
        if self.paged:
            codes, block_table = as_pages(codes, tokens, make)
        mask = None
        if self.masked:
            heads = self.heads * self.groups if self.masked == "heads" else 1
            batch = 1 if self.masked == "shared" else self.batch
            total = self.sink_length + int(tokens.max()) + self.window + self.queries
            mask = torch.rand(batch, heads, self.queries, total + 5, generator=make) < 0.7
            mask[..., total - 1 :] = True
        exact = []
        for _ in range(2):
            states = random(self.batch, self.heads, self.sink_length + ring, self.head_dim)
            empty = torch.ones(states.shape[:3], dtype=torch.bool)
            for row in range(self.batch):
                empty[row, :, : counts[Count.NUM_SINKS][row]] = False
                empty[row, :, self.sink_length + (self.ring_head + torch.arange(self.window)) % ring] = False
            exact.append(states.masked_fill(empty[..., None], torch.nan).to(self.dtype))
        inputs = {
            "query": random(self.batch, self.heads * self.groups, self.queries, self.head_dim).to(self.dtype),
            # Tokens before heads, as in a model.
            "key": random(self.batch, self.queries, self.heads, self.head_dim).to(self.dtype).transpose(1, 2),
            "value": random(self.batch, self.heads, self.queries, self.head_dim).to(self.dtype),
            "key_codes": codes[0],
            "value_codes": codes[1],
            "key_centroids": centroids[0],
            "value_centroids": centroids[1],
            "exact_keys": exact[0],
            "exact_values": exact[1],
            "counts": torch.stack([counts[count] for count in Count]).int(),
            "sink_length": self.sink_length,
            "inv_freq": 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim) if rotary_dim else None,
            "rope_scaling": self.factor,
            "mask": mask,
            "scaling": (8.0 if self.peaked else 1.0) * self.head_dim**-0.5,
            "softcap": self.softcap,
            "block_table": block_table,
        }
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def as_pages(
    codes: list[torch.Tensor], tokens: torch.Tensor, make: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Codes `[B, M, R, C]` as shuffled pages `[P, M, R, 64]`, and the block table `[B, C / 64]` on their device.

    Entries behind the last code name pages that there are not.
    """
    batch, capacity = codes[0].shape[0], codes[0].shape[-1]
    order = torch.randperm(batch * capacity // PAGE + 2, generator=make)[:-2].view(batch, -1)
    pages = []
    for part in codes:
        split = part.unflatten(-1, (-1, PAGE)).permute(0, 3, 1, 2, 4)
        held = torch.full((order.numel() + 2, *split.shape[2:]), 255, dtype=torch.uint8, device=part.device)
        held[order.to(part.device)] = split
        pages.append(held)
    used = torch.arange(capacity // PAGE) * PAGE < tokens.cpu()[:, None]
    return pages, torch.where(used, order, 2**24).int().to(codes[0].device)


def contiguous_codes(inputs: dict, kind: str) -> torch.Tensor:
    """Codes `[B, M, R, C]`, on the CPU, of a step with or without pages."""
    codes = inputs[f"{kind}_codes"].cpu()
    if inputs["block_table"] is None:
        return codes
    table = inputs["block_table"].cpu().long()
    table = torch.where(table < len(codes), table, 0)
    return codes[table].permute(0, 2, 3, 1, 4).flatten(-2)


def named_counts(inputs: dict) -> dict[str, list[int]]:
    """The counts of each row by name."""
    return {count.name: inputs["counts"][count].tolist() for count in Count}


def decoded_keys(inputs: dict) -> torch.Tensor:
    """Rotated coded keys `[B, H, C, D]` in float64, on the CPU."""
    heads = inputs["exact_keys"].shape[1]
    keys = decode_oracle(contiguous_codes(inputs, "key"), inputs["key_centroids"].cpu(), heads)
    if inputs["inv_freq"] is None:
        return keys
    positions = inputs["counts"][Count.FIRST_POSITION].cpu()[:, None] + torch.arange(keys.shape[2])
    return rotate_oracle(keys, positions, inputs["inv_freq"].cpu(), inputs["rope_scaling"])


def decoded_values(inputs: dict) -> torch.Tensor:
    """Coded values `[B, H, C, D]` in float64, on the CPU."""
    heads = inputs["exact_keys"].shape[1]
    return decode_oracle(contiguous_codes(inputs, "value"), inputs["value_centroids"].cpu(), heads)


def decode_attention_oracle(inputs: dict) -> torch.Tensor:
    """The result `[B, Q, Hq, D]` of a decode step in float64, on the CPU."""
    heads, slots = inputs["exact_keys"].shape[1:3]
    keys = torch.cat([decoded_keys(inputs), inputs["exact_keys"].cpu().double(), inputs["key"].cpu().double()], 2)
    values = [decoded_values(inputs), inputs["exact_values"].cpu().double(), inputs["value"].cpu().double()]
    visible = visible_oracle(
        named_counts(inputs),
        keys.shape[2] - slots - inputs["query"].shape[2],
        inputs["sink_length"],
        slots - inputs["sink_length"],
        inputs["query"].shape[2],
        inputs["mask"],
    )
    # Empty slots, of which some hold NaN, are no part of the equations.
    empty = ~visible.any((1, 2))[:, None, :, None]
    return attention_oracle(
        inputs["query"].cpu(),
        keys.masked_fill(empty, 0.0),
        torch.cat(values, 2).masked_fill(empty, 0.0),
        visible,
        inputs["scaling"],
        inputs["softcap"],
    ).transpose(1, 2)


def ring_oracle(inputs: dict, kind: str) -> torch.Tensor:
    """What `exact_keys` or `exact_values` hold after a step."""
    exact, new = inputs[f"exact_{kind}s"].clone(), inputs[kind]
    ring = exact.shape[2] - inputs["sink_length"]
    for row, (head, filled) in enumerate(inputs["counts"][[Count.RING_HEAD, Count.NUM_EXACT]].T.tolist()):
        slots = inputs["sink_length"] + (head + filled + torch.arange(new.shape[2])) % ring
        exact[row][:, slots] = new[row]
    return exact


def triton_arguments(inputs: dict) -> dict:
    """The arguments of `decode_attention`, with prepared keys and a fresh workspace."""
    from transformers_gsrq.ops.triton.decode_attention import decode_workspace_bytes, prepare_keys

    arguments = dict(inputs)
    batch, num_query_heads, num_queries, head_dim = inputs["query"].shape
    num_heads = inputs["exact_keys"].shape[1]
    capacity, table = inputs["key_codes"].shape[-1], inputs["block_table"]
    size = decode_workspace_bytes(
        batch=batch,
        num_heads=num_heads,
        num_query_heads=num_query_heads,
        num_queries=num_queries,
        head_dim=head_dim,
        value_stages=inputs["value_codes"].shape[2],
        value_subspace_dim=inputs["value_centroids"].shape[-1],
        capacity=capacity if table is None else table.shape[-1] * PAGE,
        device=inputs["query"].device,
    )
    keys = prepare_keys(
        arguments.pop("key_centroids"),
        num_heads,
        head_dim,
        arguments.pop("inv_freq"),
        arguments.pop("rope_scaling"),
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=inputs["query"].device)
    return arguments | {"keys": keys, "workspace": workspace}


def run_triton(inputs: dict) -> torch.Tensor:
    """The result `[B, Q, Hq, D]` of a step by the kernels, which also append to the ring of `inputs`."""
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    return decode_attention(**triton_arguments(inputs))


def relative_error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    """Euclidean error over the whole output; NaN if anything was not written."""
    return ((out.cpu().double() - oracle).norm() / oracle.norm()).item()
