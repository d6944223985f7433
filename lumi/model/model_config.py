"""The shape of a model, and what follows from it by arithmetic."""

from dataclasses import dataclass, fields, replace

from lumi.config import UserError, derived
from lumi.kernels.rope_scaling import RopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. The exported `config.json` holds all of it."""

    # Token ids; that of the tokenizer.
    vocab_size: int
    # Transformer layers.
    num_layers: int
    # Width of the residual stream.
    model_dim: int
    # Query heads of a layer.
    num_heads: int
    # Width inside the MLP.
    mlp_dim: int
    # Key and value heads of a layer, shared by groups of query heads; null: num_heads.
    num_kv_heads: int = derived()
    # Width of a head; it must be even; null: model_dim / num_heads.
    head_dim: int = derived()
    # The longest sequence, in tokens.
    max_positions: int = 2048
    # The base of the rotary frequencies.
    rope_theta: float = 10_000.0
    # null: the rotary frequencies as they are.
    rope_scaling: RopeScaling | None = None
    # Leave the rotary positions out of every layer whose number, from 1 on, is a multiple of this; null: of
    # none.
    no_rope_layer_interval: int | None = None
    # Added to the mean square in RMSNorm.
    norm_eps: float = 1e-5
    # Use the embedding as the output projection too.
    tied_embeddings: bool = False
    # Normalise queries and keys, head by head.
    qk_norm: bool = False
    # Add a bias to queries, keys and values.
    qkv_bias: bool = False
    # A token sees itself and the window - 1 tokens before it; null: its document's whole past.
    window: int | None = None
    # The first layers that see everything, whatever the window.
    full_attention_layers: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            is_count = field.type in (int, int | None) and field.name != "full_attention_layers"
            if is_count and (value := getattr(self, field.name)) is not None and value < 1:
                raise UserError(field.name, "must be at least 1", got=value)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.model_dim % self.num_heads:
                raise UserError(
                    "model_dim", f"must be a multiple of num_heads = {self.num_heads}", got=self.model_dim
                )
            object.__setattr__(self, "head_dim", self.model_dim // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                "num_heads", f"must be a multiple of num_kv_heads = {self.num_kv_heads}", got=self.num_heads
            )
        if self.head_dim % 2:
            raise UserError("head_dim", "must be even (rotary positions turn pairs)", got=self.head_dim)
        for name, limit in (("rope_theta", 1), ("norm_eps", 0)):
            if getattr(self, name) <= limit:
                raise UserError(name, f"must be above {limit}", got=getattr(self, name))
        self._check_layers()

    def _check_layers(self) -> None:
        """Raises UserError for what would have no effect, and for what no format can hold."""
        last = self.num_layers - 1 if self.window is not None else 0
        if not 0 <= self.full_attention_layers <= last:
            expectation = "must be from 0 to num_layers - 1 with a window, and 0 without"
            raise UserError("full_attention_layers", expectation, got=self.full_attention_layers)
        interval = self.no_rope_layer_interval
        if interval is not None and interval > self.num_layers:
            expectation = f"must be at most num_layers = {self.num_layers}, or null"
            raise UserError("no_rope_layer_interval", expectation, got=interval)
        exclusive = {"qk_norm": self.qk_norm, "qkv_bias": self.qkv_bias, "no_rope_layer_interval": interval}
        if len(given := [name for name, value in exclusive.items() if value]) > 1:
            expectation = f"must not be set together with {given[0]} (no model family has both)"
            raise UserError(given[1], expectation, got=exclusive[given[1]])

    @property
    def num_parameters(self) -> int:
        """The number of parameters, by arithmetic."""
        matrix = self.vocab_size * self.model_dim
        embeddings = matrix if self.tied_embeddings else 2 * matrix
        projections = 2 * self.model_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        if self.qkv_bias:
            projections += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        norms = 2 * self.model_dim + (2 * self.head_dim if self.qk_norm else 0)
        layer = projections + 3 * self.model_dim * self.mlp_dim + norms
        return embeddings + self.num_layers * layer + self.model_dim

    def flops_per_token(self, context: int, frozen: bool = False) -> int:
        """Floating-point operations to train one token.

        6 for each weight of a matrix product (4 if it is frozen and needs no gradient), and causal attention
        over `context` tokens (Kaplan et al. 2020, arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311).
        """
        lookup = 0 if self.tied_embeddings else self.vocab_size * self.model_dim  # no product
        products = (4 if frozen else 6) * (self.num_parameters - lookup)
        return products + self.attention_flops_per_token(context)

    def attention_flops_per_token(self, context: int) -> int:
        """Those of `flops_per_token` that attention itself takes.

        6 for each key that a token sees, twice its mean number over `context` tokens: that is `context`, or
        w (2 context - w) / context in a window of w.
        """
        window = min(self.window or context, context)
        full = self.num_layers if self.window is None else self.full_attention_layers
        seen = full * context + (self.num_layers - full) * window * (2 * context - window) // context
        return 6 * self.num_heads * self.head_dim * seen

    def layer_window(self, layer: int) -> int | None:
        """The window of a layer, counted from 0."""
        return None if layer < self.full_attention_layers else self.window

    def layer_has_rope(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has rotary positions."""
        return self.no_rope_layer_interval is None or (layer + 1) % self.no_rope_layer_interval != 0

    @property
    def one_layer(self) -> "ModelConfig":
        """The same with one layer. It has the parameters of every layer."""
        return replace(self, num_layers=1, window=None, full_attention_layers=0, no_rope_layer_interval=None)
