"""Three slow, literal implementations to compare the library with. They import nothing from it.

``paper_oracle`` is the paper's method, one image, one head, one token at a time, over a timm
VisionTransformer's own submodules. It never removes a token: a pruned patch stays where it is, its key
is masked with -inf from the next block on, and its row is computed and ignored. Choices where the paper
is silent:

- A block's evidence M[h, j] is the strongest attention that any *surviving* query, prefix tokens
  included, pays to key j. It covers every head still alive on entry to the block.
- The patches to keep are chosen after the block's attention, from the cumulative score that includes
  that attention, and leave before the same block's MLP.
- Heads are chosen per image by the cumulative sum of their evidence over all surviving tokens, prefix
  included. A head not kept is masked before the projection of the same block, and stays out: in later
  blocks it gives no output and no evidence. ``head_cascade=False`` is the weaker reading: the mask is drawn
  anew in every block from the cumulative scores of all heads, all of which go on giving evidence.
- Heads given by index, the same for every image, are absent from their block: no output, no evidence.
- The classifier head pools the survivors only.

``merge_oracle`` is ``cpvit-merge`` as docs/algorithm.md describes it, one image and one token at a time.

``released_oracle`` is what the authors' released code does (see its docstring).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class PaperOutput:
    logits: torch.Tensor  # [B, classes]
    survivors: list[torch.Tensor]  # per block [B, keep[l]], ascending patch indices
    scores: list[torch.Tensor]  # per block [B, patches], cumulative; nan where the patch had gone before
    head_scores: list[torch.Tensor]  # per block [B, heads], cumulative; frozen once the head has gone
    heads: list[torch.Tensor]  # per block [B, heads kept], ascending head indices


def embed(model: Any, images: torch.Tensor) -> torch.Tensor:
    tokens = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(model.patch_drop(tokens))


@torch.no_grad()
def paper_oracle(
    model: Any,
    images: torch.Tensor,
    keep: Sequence[int],
    heads_keep: Sequence[int] | None = None,
    *,
    head_cascade: bool = True,
    heads_given: Sequence[Sequence[int]] | None = None,
) -> PaperOutput:
    """Run the paper's method on a float64 model.

    ``keep[l]`` patches survive block l. ``heads_keep[l]`` heads survive block l's mask, chosen per image;
    ``heads_given[l]`` are the only heads block l has, for every image.
    """
    options = (keep, heads_keep, head_cascade, heads_given)
    per_image = [_one_image(model, image[None], *options) for image in images]

    def stacked(field: str) -> list[torch.Tensor]:
        return [torch.stack([out[field][block] for out in per_image]) for block in range(len(keep))]

    return PaperOutput(
        logits=torch.cat([out["logits"] for out in per_image]),
        survivors=stacked("survivors"),
        scores=stacked("scores"),
        head_scores=stacked("head_scores"),
        heads=stacked("heads"),
    )


def _one_image(
    model: Any,
    image: torch.Tensor,
    keep: Sequence[int],
    heads_keep: Sequence[int] | None,
    head_cascade: bool,
    heads_given: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    x = embed(model, image)[0]  # [tokens, dim]
    prefix = model.num_prefix_tokens
    patches = list(range(prefix, x.shape[0]))  # the surviving patches, as positions in the sequence
    number_of_heads = model.blocks[0].attn.num_heads
    heads = list(range(number_of_heads))
    patch_score = [0.0] * x.shape[0]
    head_score = [0.0] * number_of_heads
    record: dict[str, Any] = {"survivors": [], "scores": [], "head_scores": [], "heads": []}

    for index, block in enumerate(model.blocks):
        alive = list(range(prefix)) + patches
        attended = block.norm1(x)
        attention = _attention(block.attn, attended, alive)  # [heads, tokens, tokens]
        rows = attention.tolist()
        if heads_given is not None:
            heads = list(heads_given[index])
        elif not head_cascade:
            heads = list(range(number_of_heads))

        for head in heads:
            for key in alive:
                evidence = max(rows[head][query][key] for query in alive)
                patch_score[key] += evidence
                head_score[head] += evidence
        record["scores"].append(
            torch.tensor(
                [patch_score[p] if p in patches else float("nan") for p in range(prefix, x.shape[0])],
                dtype=x.dtype,
            )
        )
        record["head_scores"].append(torch.tensor(head_score, dtype=x.dtype))

        if heads_keep is not None:
            ranked = sorted(heads, key=lambda head: head_score[head], reverse=True)
            heads = sorted(ranked[: heads_keep[index]])
        x = x + block.ls1(_mix(block.attn, attended, attention, heads))

        ranked = sorted(patches, key=lambda patch: patch_score[patch], reverse=True)
        patches = sorted(ranked[: keep[index]])
        record["survivors"].append(torch.tensor([patch - prefix for patch in patches]))
        record["heads"].append(torch.tensor(heads))

        x = x + block.ls2(block.mlp(block.norm2(x)))

    survivors = x[list(range(prefix)) + patches]
    record["logits"] = model.forward_head(model.norm(survivors)[None])
    return record


def _split(attn: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = tokens.shape[0]
    q, k, v = attn.qkv(tokens).chunk(3, dim=-1)
    per_head = [part.reshape(count, attn.num_heads, attn.head_dim).transpose(0, 1) for part in (q, k, v)]
    return attn.q_norm(per_head[0]), attn.k_norm(per_head[1]), per_head[2]


def _attention(attn: Any, tokens: torch.Tensor, alive: list[int]) -> torch.Tensor:
    q, k, _ = _split(attn, tokens)
    mask = torch.full((tokens.shape[0],), float("-inf"), dtype=tokens.dtype)
    mask[alive] = 0.0
    return torch.stack(
        [torch.softmax(q[h] @ k[h].T * attn.scale + mask, dim=-1) for h in range(attn.num_heads)]
    )


def _mix(attn: Any, tokens: torch.Tensor, attention: torch.Tensor, heads: list[int]) -> torch.Tensor:
    value = _split(attn, tokens)[2]
    outputs = [
        attention[h] @ value[h] if h in heads else torch.zeros_like(value[h]) for h in range(attn.num_heads)
    ]
    return attn.proj(attn.norm(torch.cat(outputs, dim=-1)))


@dataclass
class MergeOutput:
    logits: torch.Tensor  # [B, classes]
    tokens: list[torch.Tensor]  # per block [B, prefix + keep[l], dim], after its MLP
    sizes: list[torch.Tensor]  # per block [B, keep[l]], of each token
    carriers: list[torch.Tensor]  # per block [B, patches], index of the token that each patch is in
    positions: list[torch.Tensor]  # per block [B, keep[l]], patch index of each token


@dataclass
class MergeToken:
    value: torch.Tensor  # [dim]
    position: int
    patches: list[int]  # every patch in it, its own position among them
    size: float = 1.0


MERGE_FLOOR = 0.1


@torch.no_grad()
def merge_oracle(
    model: Any, images: torch.Tensor, keep: Sequence[int], *, pools_patches: bool
) -> MergeOutput:
    """Run ``cpvit-merge`` on a float64 model: ``keep[l]`` patch tokens leave block l.

    ``pools_patches`` says whether the head reads patch tokens: it then gets each one once per patch in it.
    """
    per_image = [_merge_one_image(model, image[None], keep, pools_patches) for image in images]

    def stacked(field: str) -> list[torch.Tensor]:
        return [torch.stack([out[field][block] for out in per_image]) for block in range(len(keep))]

    return MergeOutput(
        logits=torch.cat([out["logits"] for out in per_image]),
        tokens=stacked("tokens"),
        sizes=stacked("sizes"),
        carriers=stacked("carriers"),
        positions=stacked("positions"),
    )


def _merge_one_image(
    model: Any, image: torch.Tensor, keep: Sequence[int], pools_patches: bool
) -> dict[str, Any]:
    embedded = embed(model, image)[0]  # [tokens, dim]
    count = model.num_prefix_tokens
    prefix = [embedded[place] for place in range(count)]
    patches = [
        MergeToken(embedded[count + number], number, [number]) for number in range(embedded.shape[0] - count)
    ]
    number_of_patches = len(patches)
    record: dict[str, Any] = {"tokens": [], "sizes": [], "carriers": [], "positions": []}

    for block, left in zip(model.blocks, keep, strict=True):
        x = torch.stack(prefix + [token.value for token in patches])
        attended = block.norm1(x)
        attention = _proportional_attention(block.attn, attended, [1] * count + [t.size for t in patches])
        x = x + block.ls1(_mix(block.attn, attended, attention, list(range(block.attn.num_heads))))
        prefix = [x[place] for place in range(count)]
        patches = [
            MergeToken(x[count + number], token.position, token.patches, token.size)
            for number, token in enumerate(patches)
        ]
        if left < len(patches):
            patches = _merge_to(patches, _importance(attention, count), left, count)

        x = torch.stack(prefix + [token.value for token in patches])
        x = x + block.ls2(block.mlp(block.norm2(x)))
        prefix = [x[place] for place in range(count)]
        patches = [
            MergeToken(x[count + number], token.position, token.patches, token.size)
            for number, token in enumerate(patches)
        ]
        record["tokens"].append(x)
        record["sizes"].append(torch.tensor([token.size for token in patches], dtype=x.dtype))
        record["carriers"].append(
            torch.tensor([_holder(patches, number) for number in range(number_of_patches)])
        )
        record["positions"].append(torch.tensor([token.position for token in patches]))

    if pools_patches:
        everywhere = [patches[_holder(patches, number)].value for number in range(number_of_patches)]
        x = torch.stack(prefix + everywhere)
    record["logits"] = model.forward_head(model.norm(x)[None])
    return record


def _holder(tokens: list[MergeToken], patch: int) -> int:
    """The only token that a patch is in."""
    (holder,) = [place for place, token in enumerate(tokens) if patch in token.patches]
    return holder


def _proportional_attention(attn: Any, tokens: torch.Tensor, sizes: list[float]) -> torch.Tensor:
    """[heads, tokens, tokens]: a token of size s attracts as much attention as s copies of it."""
    q, k, _ = _split(attn, tokens)
    heads = []
    for head in range(attn.num_heads):
        weights = torch.exp(q[head] @ k[head].T * attn.scale)
        for key, size in enumerate(sizes):
            weights[:, key] = weights[:, key] * size
        heads.append(weights / weights.sum(dim=1, keepdim=True))
    return torch.stack(heads)


def _importance(attention: torch.Tensor, prefix: int) -> list[float]:
    """Attention of the class token (of the mean query without one) to each patch, over its mean over the patches."""
    rows = attention.tolist()
    count = attention.shape[1]
    queries = [0] if prefix else list(range(count))
    received = [
        sum(rows[head][query][key] for head in range(len(rows)) for query in queries) / len(queries)
        for key in range(prefix, count)
    ]
    mean = sum(received) / len(received)
    return [value / mean for value in received]


def _merge_to(tokens: list[MergeToken], importance: list[float], left: int, prefix: int) -> list[MergeToken]:
    """Merge the patch tokens of one image until ``left`` are left."""
    removed = len(tokens) - left
    places = list(range(len(tokens)))
    if removed > len(tokens) // 2:
        ranked = sorted(places, key=lambda place: importance[place], reverse=True)
        destinations, merged = sorted(ranked[:left]), ranked[left:]
        partner = {source: _most_similar(tokens, source, destinations) for source in merged}
        return [_united(tokens, place, partner) for place in destinations]

    sources = [place for place in places if (prefix + place) % 2 == 0]
    destinations = [place for place in places if (prefix + place) % 2 == 1]
    partner = {source: _most_similar(tokens, source, destinations) for source in sources}
    alone = {source: _cost(tokens, importance, source, [partner[source]]) for source in sources}
    cost = {}
    for source in sources:
        cheaper = [
            other for other in sources if partner[other] == partner[source] and alone[other] < alone[source]
        ]
        cost[source] = _cost(tokens, importance, source, [partner[source], *cheaper])
    merged = sorted(sources, key=lambda source: cost[source])[:removed]
    partner = {source: partner[source] for source in merged}
    unmerged = [source for source in sources if source not in merged]
    return [tokens[place] for place in unmerged] + [_united(tokens, place, partner) for place in destinations]


def _most_similar(tokens: list[MergeToken], source: int, destinations: list[int]) -> int:
    return max(destinations, key=lambda place: _cosine(tokens[source].value, tokens[place].value))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def _cost(tokens: list[MergeToken], importance: list[float], i: int, group: list[int]) -> float:
    """Of merging token i into the first token of a group that the others have been merged into."""
    size_i, size_j = tokens[i].size, sum(tokens[j].size for j in group)
    importance_j = sum(importance[j] for j in group)
    ward = size_i * size_j / (size_i + size_j)
    distance = 1 - _cosine(tokens[i].value, tokens[group[0]].value)
    return ward * distance * (importance[i] / size_i + importance_j / size_j + MERGE_FLOOR)


def _united(tokens: list[MergeToken], destination: int, partner: dict[int, int]) -> MergeToken:
    """The destination and its sources as one token; the destination itself if it has none."""
    group = [tokens[destination]] + [
        tokens[source] for source, into in partner.items() if into == destination
    ]
    if len(group) == 1:
        return group[0]
    patches = [patch for token in group for patch in token.patches]
    size = sum(token.size for token in group)
    mean = sum(token.size * token.value for token in group) / size
    stretch = max(float(token.value.norm()) for token in group) / float(mean.norm())
    return MergeToken(mean * stretch, tokens[destination].position, patches, size / math.sqrt(stretch))


@dataclass
class ReleasedOutput:
    logits: torch.Tensor  # [B, classes]
    attention_tokens: list[float]  # per block, the mean number of tokens left unzeroed
    ffn_tokens: list[float]


RELEASED_COUNTERS = {
    "intended": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "released": [0, 2, 4, 6, 8, 10, 0, 2, 4, 6, 8, 10],
}


@torch.no_grad()
def released_oracle(
    model: Any,
    images: torch.Tensor,
    counter: str = "intended",
    scale: float = 1.0,
    stale: bool | None = None,
) -> ReleasedOutput:
    """What the authors' released code does to a 12-block model, batched.

    - Before a block's attention, the tokens of lowest cumulative score (all previous blocks) are set to
      zero after the LayerNorm: none for c <= 2, 5% * (c - 2) for c = 3..8, 30% for c >= 9.
    - That attention's scores are added. Every query counts, zeroed ones too, and so does every key.
    - Before the MLP, the lowest 4% * c are set to zero after the LayerNorm.
    - The class token is scored and ranked with the rest; the residual stream passes everything through,
      and a zeroed token still goes through the layers as its biases: as a query, as a key and in the MLP.
    - The number zeroed is int(ratio * tokens), that many strictly below the threshold.
    - ``counter='released'``: c runs 0, 2, 4, 6, 8, 10; counter and scores start again at block 6.
    - ``stale``: the released MLP compares the scores, this block's included, with a threshold taken
      before this block's were added, so that far fewer than 4% * c fall below it. True by default for
      'released'; False, what was surely meant, for 'intended'.
    - ``scale`` multiplies the ratios, which lets it be compared at another budget (at least one token
      stays). It draws nothing at random: the sampled attention range is never used by that code.
    """
    model = model.eval()
    stale = counter == "released" if stale is None else stale
    x = embed(model, images)
    tokens = x.shape[1]
    score = x.new_zeros(x.shape[:2])
    attention_tokens, ffn_tokens = [], []

    def lowest(score: torch.Tensor, ranking: torch.Tensor, ratio: float) -> torch.Tensor:
        rank = min(int(ratio * scale * tokens + 1e-9), tokens - 1)
        return score < ranking.sort(dim=1).values[:, rank, None]

    for block, count in zip(model.blocks, RELEASED_COUNTERS[counter], strict=True):
        if count == 0:
            score = torch.zeros_like(score)
        before = score
        zeroed = lowest(score, score, 0.05 * (min(count, 8) - 2) if count > 2 else 0.0)
        attended = block.norm1(x).masked_fill(zeroed[..., None], 0.0)
        out, evidence = _scored_attention(block.attn, attended)
        x = x + block.ls1(out)
        score = score + evidence
        attention_tokens.append(tokens - zeroed.sum(1).double().mean().item())

        zeroed = lowest(score, before if stale else score, 0.04 * count)
        x = x + block.ls2(block.mlp(block.norm2(x).masked_fill(zeroed[..., None], 0.0)))
        ffn_tokens.append(tokens - zeroed.sum(1).double().mean().item())

    return ReleasedOutput(model.forward_head(model.norm(x)), attention_tokens, ffn_tokens)


def _scored_attention(attn: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, count, _ = tokens.shape
    q, k, v = (
        part.reshape(batch, count, attn.num_heads, attn.head_dim).transpose(1, 2)
        for part in attn.qkv(tokens).chunk(3, dim=-1)
    )
    weights = torch.softmax(attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2) * attn.scale, dim=-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, count, -1)
    return attn.proj(attn.norm(mixed)), weights.amax(dim=2).sum(dim=1)


def equivalent_macs(model: Any, attention_tokens: list[float], ffn_tokens: list[float]) -> float:
    """Multiply-accumulates of one image if a zeroed token were truly absent from that half of the block."""
    embedding = model.patch_embed.proj
    total = float(model.patch_embed.num_patches * embedding.weight.numel())
    for block, attended, fed in zip(model.blocks, attention_tokens, ffn_tokens, strict=True):
        projections = block.attn.qkv.weight.numel() + block.attn.proj.weight.numel()
        total += attended * projections + 2 * attended**2 * block.attn.proj.in_features
        total += fed * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())
    head = getattr(model.head, "weight", None)
    return total + (0 if head is None else head.numel())
