"""Check plans: memory, times, compiled figures, search, plan files, and bad requests."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from paths import CONFIGS

import gpipe_jax as gpipe
from gpipe_jax.cli import main as cli
from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError
from gpipe_jax.pipeline import memory, remat
from gpipe_jax.planner import job, plan_file, predict, programs, search, step_time
from gpipe_jax.planner.job import Layout
from gpipe_jax.planner.plan import Plan
from gpipe_jax.schedules import generators
from gpipe_jax.schedules.buffers import lower
from gpipe_jax.tpu_compiler import libtpu, topologies
from gpipe_jax.training import from_config

TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'gpipe-jax[tpu]' (Linux x86-64)",
)
DIGITS = CONFIGS / "digits.yaml"
V3 = topologies.parse("v3:2x2")
LM = {"vocabulary": 64, "length": 16, "width": 32, "heads": 2, "feed_forward": 64, "layers": 6}


def small_job(batch: int = 16, **options: Any) -> job.Job:
    tokens = jax.ShapeDtypeStruct((batch, 16), np.int32)
    layers = gpipe.zoo.transformer_lm(**{**LM, **options})
    loss = gpipe.losses.softmax_cross_entropy
    return job.Job(layers, loss, {"inputs": tokens, "labels": tokens}, optax.adam(1e-3))


# ---- by analysis --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "text", "transformer_48", "amoebanet_digits"])
def test_the_example_of_a_config_has_the_shapes_of_its_data(name: str) -> None:
    config = loader.load(CONFIGS / f"{name}.yaml")
    batch = next(from_config.dataset(config).train(0))

    def shape_of(a: np.ndarray) -> tuple:
        return np.shape(a), jax.dtypes.canonicalize_dtype(np.asarray(a).dtype)

    expected = {k: shape_of(batch[k]) for k in ("inputs", "labels")}
    assert {k: (a.shape, a.dtype) for k, a in from_config.example(config).items()} == expected


def test_memory_is_that_of_the_arrays() -> None:
    """Count on one device: parameters, two slots of Adam and its count, gradients in float32."""
    trainer = small_job().build_trainer(Layout(micro_batches=4))
    uses = trainer.device_bytes()
    own = 4 * sum(a.size for s in trainer.pipe.shapes for a in jax.tree.leaves(s.params))
    assert (uses["parameters"], uses["gradients"], uses["stash"]) == (own, own, 0)
    assert uses["optimizer"] == 2 * own + 4
    assert uses["batch"] == 16 * (2 * 16 * 4 + 4)
    assert sum(uses.values()) > 4 * own + uses["working_set"] > 4 * own


def test_the_stash_is_what_the_schedule_keeps() -> None:
    boundary = 2 * 16 * 32 * 4  # two sequences of 16 vectors of 32 floats
    for kind in ("gpipe", "1f1b"):
        layout = Layout(stages=2, micro_batches=8, schedule=kind)
        stash = small_job().build_trainer(layout).device_bytes()["stash"]
        rows = lower(generators.make(kind, 2, 8))
        assert rows.x_slots == (8 if kind == "gpipe" else 2)
        assert stash == (rows.x_slots + rows.g_slots + 4) * boundary


def test_recomputing_layer_by_layer_needs_less() -> None:
    working = [
        small_job()
        .build_trainer(Layout(micro_batches=4, remat=remat))
        .device_bytes()["working_set"]
        for remat in ("stage", "layer")
    ]
    assert working[1] < 0.5 * working[0]


def test_a_plan_without_a_topology_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "compile_programs", None)
    plan = gpipe.plan(DIGITS)
    assert plan.topology is plan.step_time_s is plan.fits is plan.collectives is None
    assert plan.hbm_needed_gib == plan.hbm_analysed_gib == sum(plan.memory_gib.values())
    assert [s.layers[0] for s in plan.stages[1:]] == plan.layout["partition"]
    assert sum(s.parameters for s in plan.stages) == plan.parameters == 193_242
    assert plan.bubble_fraction == pytest.approx(3 / 11)
    assert "by analysis" in str(plan) and "<table>" in plan._repr_html_()
    json.dumps(plan.to_dict())


def test_the_picture_of_a_plan_has_the_name_that_was_given(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = gpipe.plan(DIGITS).plot(tmp_path / "plan")
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    assert len(figure.axes) == 1


def test_a_plan_of_layers_is_the_plan_of_the_config() -> None:
    config = loader.load(DIGITS, ["mesh.simulate="])  # layers alone are planned for TPU
    work, layout = job.from_config(config)
    options = {"loss": work.loss, "example": work.example, "tx": work.tx, **layout._asdict()}
    ours = gpipe.plan(work.layers, steps=work.steps, **options)
    # The config's plan alone says where `gpipe train` cuts; see test_training_cut.
    assert replace(gpipe.plan(config), config=None, warnings=[]) == ours


# ---- time ---------------------------------------------------------------------------------------


def test_the_step_time_of_a_schedule() -> None:
    """Compare with figures by hand: stages of 1 + 3 and 0 + 4 s, two micro-batches, GPipe."""
    pipe = small_job(4).build_trainer(Layout(stages=2, micro_batches=2, schedule="gpipe")).pipe
    times = step_time.stage_times([1.0, 5.0], [3.0, 4.0], remat.STAGE)
    assert times == ([1.0, 0.0], [3.0, 4.0], [1.0, 0.0])
    step = step_time.step_time(pipe.stages, pipe.schedule, times, V3, replicas=4, update_s=0.5)
    # Ticks: F, F, (F), B 4, B 4, B 3.
    assert step.compute + step.recompute + step.imbalance + step.bubble == pytest.approx(13)
    assert (step.compute, step.recompute) == (7.0, 1.0)  # 3 and 4 s a micro-batch; 1 and 0
    assert (step.imbalance, step.bubble) == (0.0, 5.0)
    wire = 2 * 16 * 32 * 4 // 2 * 2
    assert step.transfer == pytest.approx((3 + 3) * wire / 100e9)
    held = memory.float32_bytes(pipe.stages)
    assert step.gradient_reduction == pytest.approx(2 * 3 / 4 * held / 100e9)
    assert step.total == pytest.approx(sum(step)) and step.update == 0.5


def test_layer_by_layer_recomputes_twice() -> None:
    times = step_time.stage_times([1.0, 2.0], [4.0, 7.0], remat.LAYER)
    assert times.recompute == [2.0, 2.0]


def test_between_slices_the_network_is_the_slowest_link() -> None:
    pipe = small_job(4).build_trainer(Layout(stages=2, micro_batches=2)).pipe
    times = step_time.stage_times([1.0, 1.0], [3.0, 3.0], remat.STAGE)
    single, double = (
        step_time.step_time(
            pipe.stages, pipe.schedule, times, replace(V3, slices=n), replicas=1, update_s=0.0
        )
        for n in (1, 2)
    )
    assert double.transfer == pytest.approx(single.transfer * 100e9 / 6.25e9)


# ---- with the compiler --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> Plan:
    work = small_job()
    return gpipe.plan(
        work.layers,
        loss=work.loss,
        example=work.example,
        tx=work.tx,
        topology="v3-8",
        stages=2,
        data=2,
        micro_batches=4,
        schedule="eager_1f1b",
    )


@TPU
def test_a_compiled_plan_says_what_it_is_made_of(compiled: Plan) -> None:
    assert compiled.fits and compiled.topology == "v3:2x2"
    assert compiled.step_time_s == pytest.approx(sum(compiled.time_s.values())) and (
        compiled.throughput == pytest.approx(16 / compiled.step_time_s)
    )
    assert all(value > 0 for name, value in compiled.time_s.items() if name != "imbalance")
    assert set(compiled.collectives_in_loops) == {"collective-permute"}
    assert set(compiled.collectives) == {"all-reduce"} and compiled.asynchronous is False
    assert compiled.compiled_gib["arguments"] >= 0.9 * 3 * compiled.memory_gib["parameters"]
    assert compiled.hbm_needed_gib == pytest.approx(sum(compiled.compiled_gib.values()))
    assert compiled.versions["libtpu"]
    assert any("uses 4 of the 8 devices" in warning for warning in compiled.warnings)
    assert [stage.forward_s > 0 for stage in compiled.stages] == [True, False]
    assert "compiled, not run" in str(compiled)


@TPU
def test_the_compiler_needs_what_the_analysis_says() -> None:
    """Find no copies of parameters or gradients: each of five such arrays is held once."""
    sizes = {"width": 1024, "heads": 8, "feed_forward": 4096, "vocabulary": 1024}
    work = small_job(8, layers=8, dtype="bfloat16", **sizes)
    layout = Layout(stages=2, micro_batches=8, remat="layer")
    plan = predict.compile_plan(work, layout, predict.Compiler(V3))
    share = sum(plan.memory_gib[name] for name in ("parameters", "optimizer", "gradients"))
    assert share > 0.9 * plan.hbm_analysed_gib
    assert 0.9 < plan.hbm_needed_gib / plan.hbm_analysed_gib < 1.15


@TPU
def test_a_plan_is_drawn(compiled: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = compiled.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    assert len(figure.axes) == len(compiled.plot().axes) == 2


@TPU
def test_cycles_of_layers_balance_the_stages() -> None:
    """Give a wide feed-forward layer a higher cost; compile equal blocks once."""
    work = small_job()
    seconds = predict.layer_seconds(work, Layout(micro_batches=4), predict.Compiler(V3))
    assert len(seconds) == len(work.layers) and min(seconds) > 0
    assert len(set(seconds[2:-1])) == 1  # the first block has no gradient to send
    wide = predict.layer_seconds(
        small_job(feed_forward=4096), Layout(micro_batches=4), predict.Compiler(V3)
    )
    assert wide[2] > 1.5 * seconds[2]


@TPU
def test_the_plan_of_what_does_not_fit() -> None:
    plan = gpipe.plan(
        gpipe.zoo.mlp((30_000, 30_000, 30_000, 10)),
        loss=gpipe.losses.softmax_cross_entropy,
        example={
            "inputs": jax.ShapeDtypeStruct((4, 30_000), np.float32),
            "labels": jax.ShapeDtypeStruct((4,), np.int32),
        },
        tx=optax.adam(1e-3),
        topology="v2:2x2",
    )
    assert plan.fits is False and plan.hbm_needed_gib > plan.hbm_usable_gib == 7.48
    assert plan.problem.startswith("does not fit by ") and "no, by" in str(plan)
    assert plan.collectives is None and plan.step_time_s is None
    json.dumps(plan.to_dict())


def test_a_search_ranks_what_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(work: job.Job, layout: Layout, compiler: Any) -> Plan:
        seen.append(layout)
        plan = predict.analyse(work, layout)
        if len(seen) == 2:
            return replace(plan, fits=False)
        return replace(plan, fits=True, step_time_s=1.0 / len(seen), throughput=1.0)

    monkeypatch.setattr(predict, "compile_plan", fake)
    ranking = search.search(small_job(), predict.Compiler(V3), 3)
    assert [p.fits for p in ranking.plans] == [True, True, True, False]  # until three fit
    assert ranking.plans[0].step_time_s < ranking.plans[1].step_time_s
    assert ranking.plans[-1].step_time_s is None and "unknown" in str(ranking)
    assert all(layout.stages * layout.data == 8 for layout in seen)
    # What is compiled is cut as it was analysed.
    assert all(len(layout.partition) == layout.stages * layout.chunks - 1 for layout in seen)
    assert len(str(ranking).splitlines()) == 8 and "gpipe train --plan FILE" in str(ranking)
    assert ranking.too_large == 0
    json.dumps(ranking.to_dict())


def test_candidates_are_all_legal_layouts() -> None:
    """List by hand: eight devices, eight layers, 16 sequences, micro-batches of powers of two."""
    layouts = {c.layout for c in search.candidates(small_job(), V3)}
    expected = set()
    for K in (1, 2, 4, 8):
        kinds = [("1f1b", 1)] if K == 1 else [("gpipe", 1), ("1f1b", 1), ("eager_1f1b", 1)]
        kinds += [("interleaved", V) for V in (2, 4) if K > 1 and K * V <= 8]
        counts = [M for M in (1, 2, 4, 8, 16) if M <= 16 // (8 // K)]
        expected |= {Layout(K, 8 // K, M, *kind) for M in counts for kind in kinds}
    assert layouts == expected
    for layout in list(layouts)[:5]:
        small_job().build_trainer(layout)  # legal


def test_layer_by_layer_is_tried_where_a_stage_is_too_large() -> None:
    small = replace(V3, generation=V3.generation._replace(hbm_gib=1e-3))
    policies = {c.layout.remat for c in search.candidates(small_job(), small)}
    assert policies == {"stage", "layer"}


@pytest.mark.parametrize("remat", ["stage", "layer"])
def test_stages_with_tied_parameters_can_be_compiled_alone(remat: str) -> None:
    pipe = small_job(tied=True).build_trainer(Layout(stages=2, micro_batches=4, remat=remat)).pipe
    assert len(programs.of_stages(pipe)) == 4
    alone = programs.of_layers(pipe, operations=("backward",))
    assert [*alone] == [("backward", i) for i in (0, 1, 7)]  # embedding, block, head
    assert [piece.name for piece in alone.values()] == ["backward 0", "backward 1", "backward 7"]


def test_the_gradients_of_a_scanned_run_exist_at_once() -> None:
    """Hold the gradients of nine layers at once; eight are unrolled, and hold one at a time."""
    short, long = (
        small_job(layers=n).build_trainer(Layout(micro_batches=4)).device_bytes()["working_set"]
        for n in (8, 9)
    )
    block = 4 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)  # the matrices of one
    assert long - short > 8 * block


def test_a_slow_schedule_and_more_bubble_rank_lower() -> None:
    steps = {c.layout: c.step_s for c in search.candidates(small_job(), V3)}

    def at(kind: str, V: int = 1, M: int = 8) -> float:
        return steps[Layout(4, 2, M, kind, V)]

    assert at("eager_1f1b") == pytest.approx(at("gpipe"), rel=0.05)  # but for transfers
    assert at("eager_1f1b") < at("1f1b")
    assert at("interleaved", 2) < at("eager_1f1b")


# ---- plan files ---------------------------------------------------------------------------------


def test_a_plan_file_lays_a_run_out(tmp_path: Path) -> None:
    plan = gpipe.plan(loader.load(DIGITS, ["mesh.stages=3", "mesh.data=1"]))
    plan_file.save(plan, tmp_path / "plan.json")
    given = plan_file.overrides(tmp_path / "plan.json", str(DIGITS), ["train.seed=3"])
    config = loader.load(DIGITS, given)
    assert (config.mesh.stages, config.mesh.data, config.train.seed) == (3, 1, 3)
    assert list(config.pipeline.partition) == plan.layout["partition"]


def test_a_plan_file_of_one_stage(tmp_path: Path) -> None:
    plan = gpipe.plan(loader.load(DIGITS, ["mesh.stages=1"]))
    plan_file.save(plan, tmp_path / "plan.json")
    given = plan_file.overrides(tmp_path / "plan.json", str(DIGITS), [])
    assert loader.load(DIGITS, given).pipeline.partition == "auto"


def test_a_plan_file_without_a_step_time_predicts_none(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert plan_file.step_time_s(tmp_path / "plan.json") is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"config": 3}'])
def test_bad_plan_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=r"cannot be read as a plan .*gpipe plan \.\.\. --out"):
        plan_file.overrides(tmp_path / "plan.json", str(DIGITS), [])


def test_a_plan_of_another_config(tmp_path: Path) -> None:
    plan_file.save(gpipe.plan(DIGITS), tmp_path / "plan.json")
    with pytest.raises(
        ConfigError, match=r"made for another config[^$]*data.batch_size: 64 before"
    ):
        plan_file.overrides(tmp_path / "plan.json", str(DIGITS), ["data.batch_size=32"])


# ---- the command line ---------------------------------------------------------------------------


KEYS = {
    "fits", "hbm_needed_gib", "hbm_usable_gib", "memory_gib", "step_time_s", "time_s", "throughput",
    "bubble_fraction", "collectives", "collectives_in_loops", "stages", "versions",
}  # fmt: skip


def test_plan_prints_json(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", str(DIGITS), "--json", "--out", str(out)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert set(json.loads(last)) >= KEYS
    assert json.loads(out.read_text()) == json.loads(last)


def test_a_file_that_cannot_be_written_loses_no_plan(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    files = ["--out", str(out), "--png", str(png), "--json"]
    assert cli.main(["plan", str(DIGITS), *files]) == cli.BAD_INPUT
    output = capsys.readouterr()
    assert f"no picture {png}: pictures need matplotlib" in output.err
    result = json.loads(output.out.splitlines()[-1])
    assert "no picture" in result.pop("error")["message"]
    assert result == json.loads(out.read_text())


@pytest.mark.slow
def test_train_follows_a_plan(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out, few = tmp_path / "plan.json", ["train.steps=2", "optimizer.warmup_steps=0"]
    assert cli.main(["plan", str(DIGITS), "mesh.data=1", "mesh.stages=2", "--out", str(out)]) == 0
    given = [str(DIGITS), "--plan", str(out), f"train.workdir={tmp_path / 'run'}", *few, "--json"]
    # The number of steps is no part of a plan, but the warm-up is the optimizer's.
    assert cli.main(["train", *given]) == cli.BAD_INPUT
    assert "optimizer.warmup_steps: 20 before, 0 now" in capsys.readouterr().err
    planned = ["mesh.data=1", "mesh.stages=2", few[1], "--out", str(out)]
    assert cli.main(["plan", str(DIGITS), *planned]) == 0
    assert cli.main(["train", *given]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert (json.loads(last)["stages"], json.loads(last)["steps"]) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology", "v5litpod-16"],
            "gpipe plan: --topology: unknown TPU generation 'v5litpod'; did you mean 'v5litepod'",
        ),
        (["--topology", "v3:4x4x4"], "has 3 dimensions, but v3 pods have 2"),
        (["--topology", "v3:64x64"], "the largest is 'v3:32x32'"),
        (["--topology", "v3:2x2", "--slices", "0"], "--slices: `slices` must be a whole number"),
        (
            ["--topology", "v3:2x2", "mesh.stages=3", "mesh.data=1"],
            "make stages x data one of 1, 2",
        ),
        (["--search"], "gpipe plan: --search: needs a --topology"),
        (["--cost", "cycles"], "--cost: cycles needs a --topology"),
        (["--out", "/nowhere/plan.json"], "there is no folder /nowhere; make it first"),
        (["--png", "/tmp"], "gpipe plan: --png: /tmp is a folder; give the path of a file"),
        (
            ["--topology", "v3:2x2", "--search", "--cost", "cycles"],
            "--cost: cannot be combined with --search",
        ),
        (["--slices", "2"], "--slices: needs a --topology"),
        (
            ["--topology", "v3-8", "--search", "--compile-best", "0"],
            "--compile-best: `compile_best` must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_bad_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", str(DIGITS), *arguments]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_missing_data_file_is_reported_at_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`gpipe plan` names the same line as `gpipe train`."""
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: {kind: mlp}\ndata:\n  kind: python\n  batch_size: 4\n  source: gone.py:make\n"
    )
    lines = []
    for command in ("plan", "train"):
        assert cli.main([command, str(path), f"train.workdir={tmp_path / 'run'}"]) == cli.BAD_INPUT
        lines.append(capsys.readouterr().err.splitlines()[1])
    assert lines[0] == lines[1] and lines[0].startswith(f"{path}:5: data: `source` gone.py:make")


def test_options_of_the_search_are_ignored_without_it() -> None:
    assert cli.main(["plan", str(DIGITS), "--compile-best", "0"]) == 0


def test_json_of_a_search() -> None:
    assert search.Ranking([], 3, 1).to_dict() == {"plans": [], "looked_at": 3, "too_large": 1}


def test_without_the_tpu_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    absent = {"jax": "1", "jaxlib": "1", "libtpu": None, "libtpu_pinned": "2"}
    monkeypatch.setattr(libtpu, "versions", lambda: absent)
    assert cli.main(["plan", str(DIGITS), "--topology", "v3:2x2"]) == cli.BAD_INPUT
    assert "pip install 'gpipe-jax[tpu]'" in capsys.readouterr().err


def test_an_option_that_does_not_fit_is_named(capsys: pytest.CaptureFixture) -> None:
    arguments = ["plan", str(DIGITS), "--topology", "v3:2x2", "mesh.stages=3"]
    assert cli.main(arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("gpipe plan: --topology: a mesh of 3 stages x 2 data replicas has 6")
    assert "which do not divide the 8 of v3:2x2; make stages x data one of 1, 2, 4, 8" in error


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_out_that_cannot_be(capsys: pytest.CaptureFixture, seconds: str) -> None:
    arguments = ["plan", str(DIGITS), "--topology", "v3:2x2", "--timeout", seconds]
    assert cli.main(arguments) == cli.BAD_INPUT
    message = "gpipe plan: --timeout: must be a number of seconds above 0, got "
    assert capsys.readouterr().err.startswith(message)


def test_a_setting_that_does_not_fit_is_located(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", str(DIGITS), "mesh.stages=99"]) == cli.BAD_INPUT
    assert "digits.yaml:" in capsys.readouterr().err


def test_a_network_that_fits_no_layout() -> None:
    work = small_job(8, width=65_536, feed_forward=8, vocabulary=65_536, layers=1)
    work = work._replace(layers=work.layers[:1] + work.layers[-1:])
    with pytest.raises(
        ValueError, match=r"no layout fits v2:2x2: .* more .*its 7.48; use more dev"
    ):
        search.search(work, predict.Compiler(topologies.parse("v2:2x2")), 1)


def test_a_batch_that_does_not_split() -> None:
    large = replace(V3, shape=(4, 4))
    with pytest.raises(ValueError, match="does not split over the 32 devices"):
        search.search(small_job(1), predict.Compiler(large), 1)


def test_layers_need_a_loss_and_a_config_says_all() -> None:
    with pytest.raises(TypeError, match="a plan of layers needs loss, example, tx too"):
        gpipe.plan(gpipe.zoo.mlp((4, 4)))
    with pytest.raises(TypeError, match=r"a config has all options; unexpected \['stages'\]"):
        gpipe.plan(DIGITS, stages=3)
