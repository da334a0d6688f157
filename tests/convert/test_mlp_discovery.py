"""Finding MLPs: every architecture is judged by what it computes, not by what its modules are called."""

import re
from dataclasses import dataclass

import pytest
import torch
from tiny import HIDDEN, INTERMEDIATE, VOCABULARY, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from dlr_lock.common.errors import DLRError
from dlr_lock.convert.mlp_discovery import check_dense, find_mlps, select_layers
from dlr_lock.convert.mlp_matching import teacher_weights


@dataclass(frozen=True)
class Expected:
    gated: bool
    act: str
    intermediate: int = INTERMEDIATE
    biases: int = 0


PLAIN_BIASES = INTERMEDIATE + HIDDEN
EXPECTED = {
    "bert": Expected(False, "gelu", biases=PLAIN_BIASES),
    "bloom": Expected(False, "gelu_pytorch_tanh", 4 * HIDDEN, 5 * HIDDEN),
    "cohere": Expected(True, "silu"),
    "falcon": Expected(False, "gelu"),
    "gemma": Expected(True, "gelu_pytorch_tanh"),
    "gemma2": Expected(True, "gelu_pytorch_tanh"),
    "gemma3_text": Expected(True, "gelu_pytorch_tanh"),
    "glm": Expected(True, "silu"),
    "gpt2": Expected(False, "gelu_new", biases=PLAIN_BIASES),
    "gpt_neox": Expected(False, "gelu", biases=PLAIN_BIASES),
    "gptj": Expected(False, "gelu_new", biases=PLAIN_BIASES),
    "helium": Expected(True, "silu"),
    "llama": Expected(True, "silu"),
    "mistral": Expected(True, "silu"),
    "mpt": Expected(False, "gelu", 4 * HIDDEN),
    "nemotron": Expected(False, "relu2"),
    "olmo2": Expected(True, "silu"),
    "opt": Expected(False, "relu", biases=PLAIN_BIASES),
    "phi": Expected(False, "gelu_new", biases=PLAIN_BIASES),
    "phi3": Expected(True, "silu"),
    "qwen2": Expected(True, "silu"),
    "qwen3": Expected(True, "silu"),
    "stablelm": Expected(True, "silu"),
    "starcoder2": Expected(False, "gelu_pytorch_tanh", biases=PLAIN_BIASES),
}


class Replay(nn.Module):
    """Stands where a DLRNet would: wants the x of the recording and gives its y."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def forward(self, x):
        torch.testing.assert_close(x, self.x, rtol=0, atol=0)
        return self.y.clone()


def tokens(length=12):
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def record(model, mlps):
    """[(x, y)] of each MLP and the model's own output."""
    seen = {}
    hooks = []
    for mlp in mlps:
        hooks += [
            model.get_submodule(mlp.module).register_forward_pre_hook(
                lambda _, args, m=mlp: seen.__setitem__((m.module, "x"), args[0].clone())
            ),
            model.get_submodule(mlp.output).register_forward_hook(
                lambda _, args, y, m=mlp: seen.__setitem__((m.module, "y"), y.clone())
            ),
        ]
    out = model(input_ids=tokens())[0]
    for hook in hooks:
        hook.remove()
    return [(seen[m.module, "x"], seen[m.module, "y"]) for m in mlps], out


@pytest.mark.parametrize("arch", EXPECTED)
def test_architecture(arch):
    expected = EXPECTED[arch]
    model = tiny_model(arch)
    mlps = find_mlps(model)

    assert [mlp.layer for mlp in mlps] == [0, 1]
    matrices = (3 if expected.gated else 2) * HIDDEN * expected.intermediate
    for mlp in mlps:
        assert (mlp.hidden_size, mlp.intermediate_size) == (HIDDEN, expected.intermediate)
        assert (mlp.gated, mlp.act) == (expected.gated, expected.act)
        assert mlp.params == matrices + expected.biases

    # Without biases the matrices alone are the MLP.
    held = [
        part
        for mlp in mlps
        for name in (mlp.module, *mlp.identity)
        for part in model.get_submodule(name).modules()
    ]
    for part in held:
        if getattr(part, "bias", None) is not None:
            nn.init.zeros_(part.bias)
    recorded, out = record(model, mlps)
    for mlp, (x, y) in zip(mlps, recorded, strict=True):
        teacher = teacher_weights(model, mlp)
        act = ACT2FN[mlp.act]
        assert (
            teacher.up.shape == (mlp.intermediate_size, HIDDEN)
            and teacher.down.shape == teacher.up.shape[::-1]
        )
        assert (teacher.gate is None) == (not mlp.gated)
        up = x @ teacher.up.T
        hidden = act(up) if teacher.gate is None else act(x @ teacher.gate.T) * up
        torch.testing.assert_close(hidden @ teacher.down.T, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())

    # Nothing but the MLPs is taken out: with their outputs in place the model gives what it gave.
    before = sum(p.numel() for p in model.parameters())
    for mlp, (x, y) in zip(mlps, recorded, strict=True):
        model.set_submodule(mlp.module, Replay(x, y))
        for name in mlp.identity:
            model.set_submodule(name, nn.Identity())
    assert before - sum(p.numel() for p in model.parameters()) == sum(mlp.params for mlp in mlps)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens())[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2", "opt"])
def test_bfloat16_finds_the_same(arch):
    model = tiny_model(arch)
    assert find_mlps(model) == find_mlps(model.to(torch.bfloat16))


def test_search_leaves_the_model_as_it_was():
    model = tiny_model("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_mlps(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Gated(nn.Module):
    """An MLP whose names and order say nothing: `form` says what it computes."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.a = nn.Linear(HIDDEN, 96 if form == "swapped" else 192, bias=True)
        self.b = nn.Linear(HIDDEN, 96) if form == "swapped" else None
        self.c = nn.Linear(96, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(96) if form == "norm" else None

    def forward(self, x):
        if self.form == "swapped":
            return self.c(self.a(x) * F.silu(self.b(x)))
        wide = self.a(x)
        if self.form == "interleaved":
            return self.c(F.silu(wide[..., ::2]) * wide[..., 1::2])
        up, gate = wide.chunk(2, -1)
        hidden = up * F.silu(gate)
        return self.c(hidden if self.norm is None else self.norm(hidden))


def with_mlps(make, layers=2):
    model = tiny_model("llama", layers=layers)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = make()
    return model


@pytest.mark.parametrize("form", ["swapped", "up first"])
def test_the_gate_is_what_the_activation_is_on(form):
    model = with_mlps(lambda: Gated(form))
    mlp = find_mlps(model)[1]
    part = model.model.layers[1].mlp
    teacher = teacher_weights(model, mlp)
    gate, up = (
        (part.b.weight, part.a.weight) if form == "swapped" else (part.a.weight[96:], part.a.weight[:96])
    )
    assert (mlp.gated, mlp.act, mlp.intermediate_size) == (True, "silu", 96)
    assert torch.equal(teacher.gate, gate) and torch.equal(teacher.up, up)
    assert torch.equal(teacher.down, part.c.weight)


@pytest.mark.parametrize("form", ["interleaved", "norm"])
def test_the_matrices_of_another_formula_are_not_known(form):
    model = with_mlps(lambda: Gated(form))
    mlp, _ = find_mlps(model)
    assert mlp.gated and mlp.params == sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert teacher_weights(model, mlp) is None


def test_norm_inside_a_known_architecture():
    model = tiny_model("bitnet")
    mlps = find_mlps(model)
    assert [mlp.module for mlp in mlps] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert teacher_weights(model, mlps[0]) is None


class Mixing(nn.Module):
    """Has the shape of an MLP, but looks at the token before."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 96), nn.Linear(96, HIDDEN)

    def forward(self, x):
        return self.down(torch.relu(self.up(x + x.roll(1, 1))))


def test_what_mixes_tokens_is_no_mlp():
    with pytest.raises(DLRError, match="not recognised"):
        find_mlps(with_mlps(Mixing))
    with pytest.raises(DLRError, match="token by token"):
        find_mlps(with_mlps(Mixing), r"layers\.\d+\.mlp$")


class Odd(nn.Module):
    """Four matrices: an MLP by no formula of ours."""

    def __init__(self):
        super().__init__()
        self.ins = nn.ModuleList([nn.Linear(HIDDEN, 40) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Linear(40, HIDDEN) for _ in range(2)])

    def forward(self, x):
        return sum(b(torch.tanh(a(x))) for a, b in zip(self.ins, self.outs, strict=True))


def test_pattern():
    model = with_mlps(Odd, layers=3)
    with pytest.raises(DLRError) as error:
        find_mlps(model)
    message = str(error.value)
    assert "model.layers.N.self_attn (q_proj 64->64, k_proj 64->32" in message and "\n" not in message
    assert "model.layers.N.mlp.ins" in message and "--mlps 'layers\\.\\d+\\.ffn$'" in message

    mlps = find_mlps(model, r"layers\.\d+\.mlp$")
    assert [mlp.module for mlp in mlps] == [f"model.layers.{i}.mlp" for i in range(3)]
    params = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert all((mlp.params, mlp.hidden_size, mlp.act) == (params, HIDDEN, "unknown") for mlp in mlps)
    assert teacher_weights(model, mlps[0]) is None


def test_pattern_takes_the_outermost_and_only_what_keeps_the_width():
    model = tiny_model("llama")
    assert find_mlps(model, "mlp") == find_mlps(model)
    with pytest.raises(DLRError, match=r"no module that --mlps 'nothing' matches"):
        find_mlps(model, "nothing")
    with pytest.raises(DLRError, match="token by token"):
        find_mlps(model, r"k_proj$")
    with pytest.raises(DLRError, match="not a regular expression"):
        find_mlps(model, "layers(")


def test_a_pattern_names_a_mixture_by_its_experts_or_by_its_block():
    model = tiny_model("deepseek_v3", layers=3)
    experts = [f"model.layers.{n}.mlp.experts" for n in (1, 2)]
    assert [mlp.module for mlp in find_mlps(model, r"mlp$")] == ["model.layers.0.mlp", *experts]
    assert [mlp.module for mlp in find_mlps(model, r"\.experts$")] == experts


def test_a_lock_without_its_mixtures_has_to_be_asked_for():
    model = tiny_model("deepseek_v3", layers=3)
    dense = find_mlps(model, r"layers\.0\.mlp$")
    for pattern in (None, "mlp$"):
        with pytest.raises(DLRError, match=r"2 of the model's 3 MLPs are mixtures of .* --layers 0$"):
            check_dense(model, dense, layers=None, pattern=pattern)
    share = re.compile(r"2 of the model's 3 MLPs are mixtures of experts and are not locked: (\d+)% of the")
    for asked in ({"layers": "0", "pattern": None}, {"layers": None, "pattern": r"layers\.0\.mlp$"}):
        found = share.match(check_dense(model, dense, **asked))
        experts = sum(p.numel() for n, p in model.named_parameters() if re.search(r"layers\.[12]\.mlp\.", n))
        assert int(found[1]) == round(100 * experts / model.num_parameters())
    for whole in (model, tiny_model("llama")):
        assert check_dense(whole, find_mlps(whole), layers=None, pattern=None) is None


@pytest.mark.parametrize("arch", ["vit", "clip"])
def test_what_takes_no_text_is_told_in_a_line(arch):
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    towers = {"text_config": tower, "vision_config": {**tower, "image_size": 32, "patch_size": 8}}
    config = AutoConfig.for_model(arch, **(towers if arch == "clip" else tower))
    why = "ViTModel reads pixel_values" if arch == "vit" else "CLIPModel takes no text"
    with pytest.raises(DLRError, match=why):
        find_mlps(AutoModel.from_config(config))


def test_no_mlp_at_all():
    with pytest.raises(
        DLRError, match=r"not recognised; found .*backbone\.layers\.N\.mixer \(in_proj 64->256"
    ):
        find_mlps(tiny_model("mamba"))


def test_shared_mlps_are_refused():
    with pytest.raises(DLRError, match="used 2 times in one pass"):
        find_mlps(tiny_model("albert"))
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(DLRError, match=r"model\.layers\.0\.mlp is used 2 times"):
        find_mlps(model)


def test_encoder_decoder_is_numbered_by_position():
    mlps = find_mlps(tiny_model("t5"))
    assert [mlp.layer for mlp in mlps] == [0, 1, 2, 3]
    assert mlps[0].module.startswith("encoder.block.0.") and mlps[3].module.startswith("decoder.block.1.")


def test_select_layers():
    mlps = find_mlps(tiny_model("llama", layers=8))

    def chosen(text):
        return [mlp.layer for mlp in select_layers(mlps, text)]

    assert chosen(None) == list(range(8))
    assert chosen("2-5,7") == [2, 3, 4, 5, 7]
    assert chosen(" 7, 0 ,0-1") == [0, 1, 7]
    for wrong in ("x", "5-2", "-1", "", "1,", "1-2-3", "1.5"):
        with pytest.raises(DLRError, match="not a layer or a range"):
            chosen(wrong)
    for outside in ("8", "0-8", "3,99", "0-999999999999"):
        with pytest.raises(DLRError, match=r"out of range: the model has MLPs in layers 0-7"):
            chosen(outside)
    with pytest.raises(DLRError, match=r"layer 4 is out of range: .* 0-3,5-7"):
        select_layers([mlp for mlp in mlps if mlp.layer != 4], "2-5")
