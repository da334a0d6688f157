"""A row of each kind of results; the kernels' is dlr_lock.microbench.bench.Row. None: not measured, or not there."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class FactRow:
    """One fact of a machine. assumed: by the cost model, in the same unit."""

    fact: str
    value: float | str | None
    unit: str = ""
    assumed: float | None = None


@dataclass(slots=True)
class HostRow:
    """What a call costs the host: kernels launched; functions called, of Python and of C; the least time of some."""

    what: str
    launches: int
    calls: int
    us: float


@dataclass(slots=True)
class SuiteRow:
    """One file of tests, counted."""

    file: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list = field(default_factory=list)  # test and reason


@dataclass(slots=True)
class ModelRow:
    """A step of a whole model. side: original or locked. engine: eager or graph, the same for both sides.

    phase: decode, one token for each of `batch` sequences after `context` tokens in a static cache; or prefill, a
    pass over `tokens` tokens whose last position's logits are worked out. error: RMS of the difference of the logits
    to those with the chains in float32 (float64 for float32 weights) over RMS; naive_error: of the chains step by step.
    """

    model: str
    hidden: int
    intermediate: int
    layers: int
    lanes: int
    depth: int
    rank: int
    phase: str
    batch: int
    tokens: int
    context: int
    dtype: str
    side: str
    engine: str
    accurate: bool = False
    error: float | None = None
    naive_error: float | None = None
    error_limit: float | None = None
    error_message: str | None = None
    median_us: float | None = None  # a step
    p20_us: float | None = None
    p80_us: float | None = None
    launches: int | None = None
    tokens_per_s: float | None = None
    gb_per_s: float | None = None  # of the weights that the step reads; Gram blocks and cache left out
    ratio_to_original: float | None = None  # of the times, by the same engine


@dataclass(slots=True)
class TrainingRow:
    """An eager training step of a whole model by one strategy, or (strategy `inference`) a pass without autograd by
    the kernels.

    Seconds are medians. accurate, of a strategy: the loss is that of the side's first strategy that could be run (the
    plain one, where it fits) within 1%, and so are the gradients of the first and the last MLP's or chain's first
    weight within 5%; gradient_error is the largest of these, |g - g0| / |g0|. accurate, of inference: the logits are
    finite and, of a locked model, those of its chains, with the errors of a ModelRow.
    """

    model: str
    lanes: int
    depth: int
    rank: int
    tokens: int
    dtype: str
    side: str
    strategy: str
    accurate: bool = False
    loss: float | None = None
    gradient_error: float | None = None
    error: float | None = None
    naive_error: float | None = None
    error_limit: float | None = None
    error_message: str | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    update_s: float | None = None
    step_s: float | None = None
    peak_bytes: int | None = None  # beyond the weights


@dataclass(slots=True)
class ConversionRow:
    """A point of the curve of a model whose layers are all locked. random: weights drawn, not trained, so that its
    fidelity says little about a real model.

    seconds and flops are of all that led to the chains, without measuring; flops as `dlr-lock plan` reckons them.
    tflop_per_s is of the activations and the fits or, where there is one, of the end-to-end phase alone;
    matmul_percent its share of what one large product reaches on the device, in `product_dtype`.
    smallest_gap: of the flatten gaps over |chain|^2, on the locked model's own activations.
    """

    name: str
    model: str
    random: bool
    text: str
    layers: int
    tokens: int  # of text, to train on
    train_tokens: int  # a module
    end_to_end: int  # training tokens of all chains together
    seconds: float
    flops: float
    original_loss: float | None
    loss: float | None
    kl: float | None
    flips: float | None
    smallest_gap: float | None
    largest_rel_error: float | None  # of the fits
    error_message: str | None = None
    tflop_per_s: float | None = None
    matmul_percent: float | None = None


@dataclass(slots=True)
class ProductsRow:
    """A module's chain that was fitted with products in one dtype, its weights and their gradients in float32.

    seconds and flops are of the fit; flops as `dlr-lock plan` reckons them.
    """

    layer: int
    chain: str
    products: str
    tokens: int  # of text, to train on
    train_tokens: int
    rel_error: float
    flatten_gap: float
    seconds: float
    flops: float
    error_ratio: float  # of rel_error to that of the same fit with products in float32
    curve: list = field(default_factory=list)  # training tokens, seconds and fidelity while it was fitted


@dataclass(slots=True)
class ProfileRow:
    """One kernel (or, on a CPU, operation) of a profiled row: its launches and time a step."""

    of: str
    ratio: float  # of the profiled row's time to the original's
    name: str
    calls: float
    us: float
    percent: float  # of all kernels' time
    error_message: str | None = None
