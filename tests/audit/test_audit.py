"""A whole audit of a tiny model: every attack has its row, an interrupted one goes on, bad input is one line."""

import json
import shutil
from pathlib import Path

import pytest
from attacked import SMALL
from safetensors.torch import load_file, save_file
from tiny import as_hub_copy, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dlr_lock
from dlr_lock import DLRError, convert_model
from dlr_lock.audit import AuditReport, audit_model
from dlr_lock.audit.context import ModelVariant
from dlr_lock.audit.costs import count_steps
from dlr_lock.audit.price import ATTACKERS
from dlr_lock.audit.sections import audit_sections
from dlr_lock.audit.texts import invented_lines
from dlr_lock.cli import app

ATTACKS = {"full", "LoRA", "outside", "PEFT"}  # of the budget quick


def audit(folder: Path, out: str, arch: str = "llama", **options: object) -> AuditReport:
    return audit_model(
        folder / f"{arch}-locked",
        folder / arch,
        folder / out,
        data=str(folder / "text.txt"),
        **SMALL | options,
    )


def figures(report: AuditReport) -> object:
    """All but what depends on the clock."""

    def timeless(value: object) -> object:
        if isinstance(value, dict):
            return {
                k: timeless(v)
                for k, v in value.items()
                if k not in ("seconds", "machine", "asymmetries", "verdicts", "price", "notes")
            }
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(report.to_dict())


def test_an_audit_and_its_files(folder: Path) -> None:
    said: set[str] = set()
    report = audit(folder, "whole", progress=lambda what, done, total: said.add(what))
    assert {row.name for row in report.structural} >= {
        "flatten",
        "merge 2",
        "drop every 2nd",
        "swap",
        "redistilled, 0.5",
    }
    assert report.attacks.keys() == ATTACKS and all(report.attacks.values())
    swap = next(row for row in report.structural if row.name == "swap")
    assert report.recovers(swap) < 1e-6 < report.recovers(report.structural[0])
    assert [len(module.students) for module in report.modules] == [3, 3]
    assert {round(c.share or 0, 2) for m in report.modules for c in m.students} == {0.5}
    done = {(run.variant, run.attack) for run in report.runs if run.best}
    variants = ("original", "locked", "redistilled, 0.5")
    tuned = {(variant, attack) for variant in variants for attack in ATTACKS}
    tuned -= {(variants[2], "outside"), (variants[2], "PEFT")}  # which undoing the chains makes no cheaper
    assert done == tuned == {(row.variant, row.attack) for row in report.steps}
    for attack in report.attacks:  # a sweep begins where the one before ended, and goes up first
        best, tried = ([r for r in report.runs if (r.variant, r.attack) == (v, attack)] for v in variants[:2])
        assert {r.rate for r in tried} == {best[0].rate, best[0].rate * 10**0.5}
    assert {v.measure for v in report.verdicts} == {"flops", "seconds", "peak"}
    assert {a.mode for a in report.asymmetries} == {"eager", "checkpointed", "best"}
    assert any("not timed" in note for note in report.notes)
    assert report.price and set(report.price.words) <= set(audit_sections(report)[0].text.splitlines())
    assert {a.who for a in report.price.attackers if a.measure == "seconds"} == set(ATTACKERS)
    assert len({d.depth for d in report.depths}) == len(report.depths) >= 2
    weakest = next(v for v in report.verdicts if (v.share, v.measure, v.tunes) == (0.9, "flops", 1))
    assert (report.price.ratio, report.price.bound) == (weakest.ratio, weakest.bound)
    written = json.loads((folder / "whole" / "audit.json").read_text(encoding="utf-8"))
    assert written["price"]["words"] == report.price.words
    assert written["schema"] == 2 and len(written["runs"]) == len(report.runs)
    assert "redistilled, 0.5" in (folder / "whole" / "audit.html").read_text(encoding="utf-8")
    assert not list(folder.glob("whole*partial")) and not list((folder / "whole").glob(".*"))
    assert str(folder) not in json.dumps(written)  # a report may be published
    assert any("fine-tuning the locked model" in what for what in said)
    with pytest.raises(DLRError, match="--overwrite"):
        audit(folder, "whole")


def test_an_interrupted_audit_goes_on_and_finds_the_same(folder: Path) -> None:
    whole = audit(folder, "first", attacks="PEFT")

    def stop(what: str, done: int, total: int) -> None:
        if "fine-tuning the locked model" in what and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="finished parts are kept"):
        audit(folder, "again", attacks="PEFT", progress=stop)
    said: list[str] = []
    assert not (folder / "again").exists()
    with pytest.raises(DLRError, match="other seed"):
        audit(folder, "again", attacks="PEFT", seed=1)
    report = audit(folder, "again", attacks="PEFT", progress=lambda what, done, total: said.append(what))
    assert figures(report) == figures(whole)
    assert not any("evaluating flatten" in what or "the original model, PEFT" in what for what in said)


def test_what_is_kept_is_of_the_same_texts_and_whole(folder: Path) -> None:
    """Damage stops the audit instead of leaving an attack out; another original of the same shape is said to be one."""
    save_tiny("llama", folder / "sibling", seed=77)

    def stop(what: str, done: int, total: int) -> None:
        if "fine-tuning the locked model" in what and done:
            raise KeyboardInterrupt

    def sibling(**options: object) -> AuditReport:
        return audit_model(
            folder / "llama-locked", folder / "sibling", folder / "mixed", data=str(folder / "text.txt"),
            task=str(task), attacks="PEFT", **SMALL | options,
        )  # fmt: skip

    task = folder / "task.txt"
    task.write_text("\n".join(invented_lines(8_000, 4)), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        sibling(progress=stop)
    task.write_text("\n".join(invented_lines(8_000, 5)), encoding="utf-8")
    with pytest.raises(DLRError, match="other text"):
        sibling()
    task.write_text("\n".join(invented_lines(8_000, 4)), encoding="utf-8")
    run = next(p for p in (folder / "mixed.partial").glob("*.json") if '"neutral"' in p.read_text())
    whole = run.read_bytes()
    run.write_text("{", encoding="utf-8")
    with pytest.raises(DLRError, match="damaged"):
        sibling()
    run.write_bytes(whole)
    assert any("other hashes" in note for note in sibling().notes)


def test_a_strewn_mlp_is_attacked_alike_on_both_sides(folder: Path) -> None:
    """OPT's MLP is two linear layers of its layer: they are the slot's, not the attention's."""
    save_tiny("opt", folder / "opt")
    dlr_lock.convert_model(
        folder / "opt", folder / "opt-locked", data=str(folder / "text.txt"), tokens=2048, heldout=512,
        train_tokens=4096, sequence=32, redistill=0.0, device="cpu", layers="1",
    )  # fmt: skip
    report = audit(folder, "opt-audit", "opt", attacks="PEFT", rates=1, seeds=1)
    plain = {s.variant: s.flops for s in report.steps if s.strategy == "LoRA, plain"}
    assert abs(plain["locked"] / plain["original"] - 1) < 0.05
    # of two layers the second is locked: the first one's MLP has adapters, of both models
    original = AutoModelForCausalLM.from_pretrained(folder / "opt")
    places = [f"model.decoder.layers.{layer}.{part}" for layer in (0, 1) for part in ("fc1", "fc2")]
    variant = ModelVariant("original", original, places, places[2:])
    row = next(iter(count_steps(variant, ["PEFT"], (report.options["batch"] // 32, 32))))
    assert row.flops == plain["original"]
    assert not report.asymmetries and any("not gated" in note for note in report.notes)


def test_a_model_without_a_head_is_not_fine_tuned(folder: Path) -> None:
    report = audit(folder, "encoder", "bert")
    assert not report.runs and not report.verdicts and len(report.structural) > 4 and report.modules
    assert any("language-model head" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "endless"], "quick, full"),
        (["--attacks", "full,QLoRA"], "QLoRA"),
        (["--shares", "0.1,x"], "--shares"),
        (["--shares", ""], "--shares"),
        (["--tuning", "0"], "--tuning"),
        (["--sequence", "1"], "--sequence"),
        (["--batch", "16", "--sequence", "32"], "--batch"),
        (["--tokens", "1", "--heldout", "1"], "less than two sequences"),
        (["--seeds", "0"], "--seeds"),
        (["--task", "nowhere.txt"], "nowhere.txt"),
        (["--data", "self"], "self"),
        (["--original", "{}/bert"], "not the model that was locked"),
        (["--original", "{}/none"], "none"),
        (["--out", "{}/text.txt"], "is not a directory"),
    ],
)
def test_bad_input_is_one_line(folder: Path, options: list[str], words: str) -> None:
    asked = ["audit", str(folder / "llama-locked"), "--device", "cpu", "--out", str(folder / "bad")]
    asked += [] if "--original" in options else ["--original", str(folder / "llama")]
    result = CliRunner().invoke(app, [*asked, *(option.format(folder) for option in options)])
    assert isinstance(result.exception, DLRError) and words in str(result.exception)
    assert "\n" not in str(result.exception) and not (folder / "bad").exists()
    assert not list(folder.glob("bad*"))


def test_the_checkpoint_must_be_locked(folder: Path) -> None:
    with pytest.raises(DLRError):
        audit_model(folder / "llama", folder / "llama", folder / "bad", **SMALL)


def test_the_command_prints_a_verdict_and_says_where_it_is(folder: Path) -> None:
    asked = [
        "audit",
        str(folder / "llama-locked"),
        "--original",
        str(folder / "llama"),
        "--data",
        str(folder / "text.txt"),
    ]
    asked += [f"--{name}={value}" for name, value in SMALL.items()]
    result = CliRunner().invoke(
        app, [*asked, "--attacks", "full", "--tuning=1024", "--out", str(folder / "printed")]
    )
    assert result.exit_code == 0, result.output
    assert "the cheapest attack on the locked model takes" in " ".join(result.output.split())
    assert "audit.html" in result.output


def test_a_locked_checkpoint_may_be_a_name_on_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    as_hub_copy(folder / "llama-locked", "owner/locked", tmp_path / "hub")
    least = {
        "tuning": 32,
        "batch": 32,
        "seeds": 1,
        "rates": 1,
        "tokens": 512,
        "shares": "0.0625",
        "attacks": "full",
    }
    asked = ["audit", "owner/locked", "--original", str(folder / "llama"), "--data", str(folder / "text.txt")]
    result = CliRunner().invoke(app, [*asked, *(f"--{n}={v}" for n, v in (SMALL | least).items())])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "locked-audit" / "audit.json").read_text())
    assert found["locked"] == "owner/locked" and [m["chain_error"] for m in found["modules"]]


def test_a_model_with_mixtures_in_other_layers_is_audited(folder: Path, tmp_path: Path) -> None:
    """Its steps are counted without data, for which torch does not know every product of the experts."""
    save_tiny("deepseek_v3", tmp_path / "source")
    convert_model(
        tmp_path / "source", tmp_path / "locked", data=str(folder / "text.txt"), layers="0", tokens=1024, heldout=256,
        train_tokens=1024, batch=256, redistill=0.0, sequence=32, device="cpu", depth=4,
    )  # fmt: skip
    least = {"tuning": 32, "batch": 32, "seeds": 1, "rates": 1, "attacks": "full,MeZO"}
    report = audit_model(
        tmp_path / "locked",
        tmp_path / "source",
        tmp_path / "audit",
        data=str(folder / "text.txt"),
        **SMALL | least,
    )
    assert {(row.variant, row.attack) for row in report.steps} >= {("locked", "full"), ("original", "MeZO")}
    assert all(row.flops > 0 for row in report.steps)
    assert not any("has no cost" in note for note in report.notes)


def test_a_tokenizer_of_another_model_is_a_line(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder / "llama-locked", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["documentation"])
    tokenizer.save_pretrained(other)
    (tmp_path / "text.txt").write_text("the documentation of the documentation\n" * 500)
    with pytest.raises(
        DLRError, match=r"the tokenizer gives token 320 .* the model's embedding has 320 rows"
    ):
        audit_model(other, folder / "llama", tmp_path / "bad", data=str(tmp_path / "text.txt"), **SMALL)


def test_a_gated_checkpoint_of_before_is_audited(folder: Path, tmp_path: Path) -> None:
    """None is saved any more, so one is made of a plain checkpoint's files."""
    gated = shutil.copytree(folder / "llama-locked", tmp_path / "gated")
    config = json.loads((gated / "config.json").read_text())
    state = load_file(gated / "model.safetensors")
    for name, spec in config["quantization_config"]["modules"].items():
        spec["gated"] = True
        state[f"{name}.dlr_G"] = state[f"{name}.dlr_A"].flip(-1).contiguous()
    (gated / "config.json").write_text(json.dumps(config))
    save_file(state, gated / "model.safetensors", metadata={"format": "pt"})
    (gated / "dlr_manifest.json").unlink()
    report = audit_model(
        gated,
        folder / "llama",
        tmp_path / "out",
        data=str(folder / "text.txt"),
        **SMALL | {"attacks": "full"},
    )
    assert {run.variant for run in report.runs} == {"original", "locked", "redistilled, 0.5"}
    assert {row.variant for row in report.steps} >= {"original", "locked"}
    assert not report.asymmetries and any("gated steps" in note for note in report.notes)
