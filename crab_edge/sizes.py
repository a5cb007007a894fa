"""The exact sizes of the bundle that a recipe makes of a model. Arithmetic only.

The exporter writes these tensors in this order; a test compares the two byte by byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from crab_edge.errors import InputError
from crab_edge.lowbit import n_blocks
from crab_edge.manifest import Manifest
from crab_edge.shape import KNOWN, AdapterShape, ModelShape

IMAGE = 224
PLANES = {"residual4x2": 2, "plane4": 1}
# By the decoder's bits; the exporter's rule.
EXPERTS = {4: ("residual4x2", "plane4", "unfolded8"), 8: ("unfolded8",), 32: ("float",)}
ALIGNMENT = 4096
INLINE_BYTES = 1024


@dataclass(frozen=True)
class WeightRecipe:
    """How weights are stored, by the names of the manifest's recipe; `scale_bytes` is 4 in every bundle.

    `block` is that of the decoder's own bits, `block8` that of the 8-bit parts beside them.
    """

    bits: int = 4
    block: int = 32
    block8: int = 32
    experts: str = "residual4x2"
    adapter_bits: int = 8
    head_bits: int = 8
    embedding_bits: int = 8
    tower_bits: int = 8
    scale_bytes: int = 4

    def block_of(self, bits: int) -> int:
        """Weights that share a scale at this many bits."""
        return self.block8 if bits == 8 else self.block


FLOAT = WeightRecipe(32, 32, 32, "float", 32, 32, 32, 32)
WIDE_BLOCK = 128


def recipe_for(shape: ModelShape, bits: int = 4, block: int = 32, experts: str = "auto") -> WeightRecipe:
    """The recipe that the exporter takes for `--bits`, `--block`, `--experts`; InputError if it has none."""
    if bits not in (4, 8, 32):
        raise InputError(f"--bits: expected 4, 8 or 32, got {bits}")
    if block not in (16, 32, 64, 128, 256):
        raise InputError(f"--block: expected 16, 32, 64, 128 or 256, got {block}")
    forms = EXPERTS[bits]
    if experts != "auto" and experts not in forms:
        raise InputError(
            f"--experts {experts} doesn't go with --bits {bits}; choose one of: auto, {', '.join(forms)}"
        )
    if bits == 32:
        return replace(FLOAT, block=block, block8=block)
    ranks = [shape.adapter.rank * shape.adapter.experts] if shape.adapter else []
    widths = [shape.hidden, shape.heads * shape.head_dim, shape.intermediate, *ranks]
    even = not any(width % block for width in widths)
    if experts == "auto":
        experts = "residual4x2" if bits == 4 and even else "unfolded8"
    elif experts in PLANES and not even:
        raise InputError(
            f"--experts {experts} needs widths that are multiples of the block {block}, and {shape.name} has "
            "others; choose --experts unfolded8"
        )
    widths = [shape.hidden, shape.vision["hidden_size"], shape.audio["d_model"]]
    return WeightRecipe(bits, block, eight_bit_block(bits, block, widths), experts)


def eight_bit_block(bits: int, block: int, widths: Iterable[int]) -> int:
    """Weights that share a scale in 8-bit parts beside a decoder of `bits` in blocks of `block`.

    At 8 bits a wide block costs no accuracy that would show, and saves scales. Where a width isn't a
    multiple of it, padding would eat the gain: then it is the decoder's own block.
    """
    wide = bits != 8 and all(width % WIDE_BLOCK == 0 for width in widths)
    return max(block, WIDE_BLOCK) if wide else block


@dataclass(frozen=True)
class Tensor:
    """One weight of a graph: its bytes, by (part, kind). Kinds: "codes", "scales", "float"."""

    name: str
    bytes: Mapping[tuple[str, str], int]

    @property
    def size(self) -> int:
        """All of its bytes."""
        return sum(self.bytes.values())


def tensors(shape: ModelShape, recipe: WeightRecipe) -> dict[str, list[Tensor]]:
    """The weights of "decoder", "vision" and "audio" in the order of the files, and of "embedding".

    Index constants of a few hundred bytes are left out.
    """
    return {
        "decoder": list(_decoder(shape, recipe)),
        "vision": list(_vision(shape, recipe)),
        "audio": list(_audio(shape, recipe)),
        "embedding": list(_embedding(shape, recipe)),
    }


def parts(shape: ModelShape, recipe: WeightRecipe) -> dict[str, dict[str, int]]:
    """Bytes by part (decoder, adapters, head, embedding, vision, audio, tower adapters) and kind."""
    total: dict[str, Counter[str]] = {}
    for entries in tensors(shape, recipe).values():
        for tensor in entries:
            for (part, kind), size in tensor.bytes.items():
                total.setdefault(part, Counter())[kind] += size
    return {part: dict(kinds) for part, kinds in total.items()}


def data_bytes(entries: list[Tensor]) -> int:
    """Size of a graph's external data file: tensors of 1 KiB and more, each from a page's start."""
    end = 0
    for tensor in entries:
        if tensor.size >= INLINE_BYTES:
            end = -(-end // ALIGNMENT) * ALIGNMENT + tensor.size
    return end


def graph_bytes(entries: list[Tensor]) -> dict[str, int]:
    """Bytes of a graph's weights by kind: what ONNX Runtime reads."""
    total: Counter[str] = Counter()
    for tensor in entries:
        for (_, kind), size in tensor.bytes.items():
            total[kind] += size
    return dict(total)


def _total(entries: Iterator[Tensor]) -> int:
    return sum(tensor.size for tensor in entries)


def _low(n: int, k: int, bits: int, recipe: WeightRecipe) -> tuple[int, int]:
    """Bytes of codes and scales of a weight [n, k]; K is filled up to whole blocks."""
    block = recipe.block_of(bits)
    blocks = n_blocks(k, block)
    return n * blocks * block * bits // 8, n * blocks * recipe.scale_bytes


def _product(
    part: str, name: str, n: int, k: int, bits: int, recipe: WeightRecipe, bias: bool = False
) -> Iterator[Tensor]:
    if bits == 32:
        yield Tensor(f"{name}.weight", {(part, "float"): 4 * n * k})
    else:
        codes, scales = _low(n, k, bits, recipe)
        yield Tensor(f"{name}.weight", {(part, "codes"): codes})
        yield Tensor(f"{name}.scales", {(part, "scales"): scales})
    if bias:
        yield Tensor(f"{name}.bias", {(part, "float"): 4 * n})


def _float(part: str, name: str, count: int) -> Tensor:
    return Tensor(name, {(part, "float"): 4 * count})


def _group(
    part: str,
    extra: str,
    name: str,
    linears: list[tuple[str, int, int, bool]],
    bits: int,
    recipe: WeightRecipe,
    adapter: AdapterShape | None,
    folds: bool,
) -> Iterator[Tensor]:
    """Linears (name, N, K, bias) of one input, with their shared router if there is an adapter."""
    if adapter is None:
        for path, n, k, bias in linears:
            yield from _product(part, path, n, k, bits, recipe, bias)
        return
    ranks = adapter.rank * adapter.experts
    rows = len(linears) * (adapter.rank + adapter.experts)
    yield from _product(extra, f"{name}.ilora_route", rows, linears[0][2], recipe.adapter_bits, recipe)
    for path, n, k, bias in linears:
        if folds:
            yield from _folded(part, extra, path, n, k, ranks, bits, recipe, bias)
        else:
            yield from _product(part, path, n, k, bits, recipe, bias)
            yield from _product(extra, f"{path}.ilora_experts", n, ranks, recipe.adapter_bits, recipe)


def _folded(
    part: str, extra: str, path: str, n: int, k: int, ranks: int, bits: int, recipe: WeightRecipe, bias: bool
) -> Iterator[Tensor]:
    """`[W | planes of sB]`: one tensor, two parts."""
    if bits == 32:
        yield Tensor(f"{path}.weight", {(part, "float"): 4 * n * k, (extra, "float"): 4 * n * ranks})
    else:
        planes = PLANES[recipe.experts]
        base, more = _low(n, k, bits, recipe), _low(n, ranks, bits, recipe)
        for kind, own, added in zip(("codes", "scales"), base, more, strict=True):
            suffix = "weight" if kind == "codes" else "scales"
            yield Tensor(f"{path}.{suffix}", {(part, kind): own, (extra, kind): planes * added})
    if bias:
        yield Tensor(f"{path}.bias", {(part, "float"): 4 * n})


def _decoder(shape: ModelShape, recipe: WeightRecipe) -> Iterator[Tensor]:
    part, extra, root = "decoder", "adapters", "language_model"
    folds = recipe.experts in PLANES or recipe.experts == "float"
    sizes = {name: (n, k) for name, n, k in shape.decoder_linears}
    yield _float(part, f"{root}.rotary_emb.table", 3 * shape.head_dim // 2)
    yield _float(part, f"{root}.layers.0.input_layernorm.weight", shape.hidden)
    for i in range(shape.layers):
        path = f"{root}.layers.{i}"

        def linears(
            names: tuple[str, ...], bias: bool, path: str = path
        ) -> Iterator[tuple[str, int, int, bool]]:
            for name in names:
                where = "self_attn" if len(name) == 1 else "mlp"
                yield (f"{path}.{where}.{name}_proj", *sizes[name], bias)

        def group(name: str, names: tuple[str, ...], bias: bool = False) -> Iterator[Tensor]:
            return _group(
                part,
                extra,
                name,
                list(linears(names, bias)),
                recipe.bits,
                recipe,
                shape.adapter,
                folds,
            )

        yield from group(f"{path}.self_attn.qkv", ("q", "k", "v"), True)
        yield from group(f"{path}.self_attn.o_proj", ("o",))
        yield _float(part, f"{path}.post_attention_layernorm.weight", shape.hidden)
        yield from group(f"{path}.mlp.gate_up", ("gate", "up"))
        yield from group(f"{path}.mlp.down_proj", ("down",))
        last = i + 1 == shape.layers
        norm = "norm" if last else f"layers.{i + 1}.input_layernorm"
        yield _float(part, f"{root}.{norm}.weight", shape.hidden)
    yield from _product("head", "lm_head", shape.vocab, shape.hidden, recipe.head_bits, recipe)


def _patches(shape: ModelShape) -> int:
    """Patches of an image: the encoder has one angle table for all of them."""
    return int((IMAGE // shape.vision["patch_size"]) ** 2)


def _vision_angles(shape: ModelShape) -> int:
    """Angles of one patch: half a head."""
    return shape.vision["hidden_size"] // shape.vision["num_heads"] // 2


def _vision(shape: ModelShape, recipe: WeightRecipe) -> Iterator[Tensor]:
    v, part, root, bits = shape.vision, "vision", "visual", recipe.tower_bits
    adapter = shape.adapter if shape.adapter is not None and shape.adapter.towers else None
    width, inner = v["hidden_size"], v["intermediate_size"]
    pixels = v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2
    for name in ("cos", "sin"):
        yield _float(part, f"{root}.rotary_pos_emb.{name}", _patches(shape) * _vision_angles(shape))
    yield from _product(part, f"{root}.patch_embed.proj", width, pixels, bits, recipe)

    def group(name: str, linears: list[tuple[str, int, int, bool]], adapted: bool) -> Iterator[Tensor]:
        mine = adapter if adapted else None
        return _group(part, "tower adapters", name, linears, bits, recipe, mine, False)

    for i in range(v["depth"]):
        path = f"{root}.blocks.{i}"
        yield _float(part, f"{path}.norm1.weight", width)
        names = [f"{path}.attn.{name}" for name in ("q", "k", "v")]
        yield from group(f"{path}.attn.qkv", [(name, width, width, True) for name in names], False)
        yield from group("", [(f"{path}.attn.proj", width, width, True)], False)
        yield _float(part, f"{path}.norm2.weight", width)
        names = [f"{path}.mlp.{name}_proj" for name in ("gate", "up")]
        yield from group(f"{path}.mlp.gate_up", [(name, inner, width, True) for name in names], True)
        down = f"{path}.mlp.down_proj"
        yield from group(down, [(down, width, inner, True)], True)
    yield _float(part, f"{root}.merger.ln_q.weight", width)
    cell = width * v["spatial_merge_size"] ** 2
    yield from _product(part, f"{root}.merger.mlp.0", cell, cell, bits, recipe, True)
    yield from _product(part, f"{root}.merger.mlp.2", v["out_hidden_size"], cell, bits, recipe, True)


def _audio(shape: ModelShape, recipe: WeightRecipe) -> Iterator[Tensor]:
    a, part, root, bits = shape.audio, "audio", "audio_tower", recipe.tower_bits
    adapter = shape.adapter if shape.adapter is not None and shape.adapter.towers else None
    width, inner = a["d_model"], a["encoder_ffn_dim"]
    for name, channels in (("conv1", a["num_mel_bins"]), ("conv2", width)):
        yield _float(part, f"{root}.{name}.weight", width * channels * 3)
        yield _float(part, f"{root}.{name}.bias", width)
    yield _float(part, f"{root}.positional_embedding", a["n_window"] * width)

    def norm(path: str) -> Iterator[Tensor]:
        yield _float(part, f"{path}.weight", width)
        yield _float(part, f"{path}.bias", width)

    for i in range(a["encoder_layers"]):
        path = f"{root}.layers.{i}"
        yield from norm(f"{path}.self_attn_layer_norm")
        linears = [(f"{path}.self_attn.{name}_proj", width, width, name != "k") for name in ("q", "k", "v")]
        yield from _group(
            part, "tower adapters", f"{path}.self_attn.qkv", linears, bits, recipe, adapter, False
        )
        yield from _product(part, f"{path}.self_attn.out_proj", width, width, bits, recipe, True)
        yield from norm(f"{path}.final_layer_norm")
        yield from _product(part, f"{path}.fc1", inner, width, bits, recipe, True)
        yield from _product(part, f"{path}.fc2", width, inner, bits, recipe, True)
    yield from norm(f"{root}.ln_post")
    yield from _product(part, f"{root}.proj", a["output_dim"], width, bits, recipe, True)


def _embedding(shape: ModelShape, recipe: WeightRecipe) -> Iterator[Tensor]:
    size = shape.vocab * shape.hidden
    if recipe.embedding_bits == 32:
        yield Tensor("embedding", {("embedding", "float"): 4 * size})
        return
    sizes = {("embedding", "codes"): size, ("embedding", "scales"): recipe.scale_bytes * shape.vocab}
    yield Tensor("embedding", sizes)


def tower_parameters(shape: ModelShape) -> dict[str, int]:
    """Parameters of "vision" and "audio", adapters left out."""
    bare = replace(shape, adapter=None)
    tables = {"vision": 2 * _patches(shape) * _vision_angles(shape)}
    tables["audio"] = shape.audio["n_window"] * shape.audio["d_model"]
    totals = {"vision": _total(_vision(bare, FLOAT)), "audio": _total(_audio(bare, FLOAT))}
    return {name: total // 4 - tables[name] for name, total in totals.items()}


def of_manifest(manifest: Manifest) -> tuple[ModelShape, WeightRecipe] | None:
    """The shape and recipe of a bundle; None for one that doesn't say and is of no known size."""
    model, recipe = manifest.model, manifest.recipe
    known = WeightRecipe(
        recipe.bits,
        recipe.block,
        recipe.block8 or recipe.block,
        recipe.experts,
        recipe.adapter_bits,
        recipe.head_bits,
        recipe.embedding_bits,
        recipe.tower_bits,
    )
    adapter = None
    if model.adapter is not None:
        towers = model.shape.tower_adapters if model.shape is not None else model.adapter.zero_linears == 0
        adapter = AdapterShape(model.adapter.rank, model.adapter.experts, towers)
    if model.shape is None:
        sizes = (model.hidden_size, model.layers, model.kv_heads, model.head_dim, model.vocab_size)
        for shape in KNOWN.values():
            if sizes == (shape.hidden, shape.layers, shape.kv_heads, shape.head_dim, shape.vocab):
                return replace(shape, name=model.name, adapter=adapter), known
        return None
    info = model.shape
    shape = ModelShape(
        model.name,
        model.hidden_size,
        info.intermediate_size,
        model.layers,
        info.heads,
        model.kv_heads,
        model.head_dim,
        model.vocab_size,
        model.max_positions,
        info.tied,
        info.vision,
        info.audio,
        adapter,
    )
    return shape, known
