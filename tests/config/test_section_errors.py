"""Test that errors name the section and the field that they are about."""

import pytest

from gpipe_jax import errors
from gpipe_jax.config import loader
from gpipe_jax.config.base import section
from gpipe_jax.distributed.device_order import arrange
from gpipe_jax.distributed.mesh import make_mesh
from gpipe_jax.errors import ConfigError
from gpipe_jax.losses import classification
from gpipe_jax.schedules import generators
from gpipe_jax.utils.checks import check_counts
from gpipe_jax.zoo import unet


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (errors.ArgumentError("image", "`image` is 8"), "image"),
        (errors.ArgumentError("memory_limit", "too low"), "memory_limit_gib"),
        (ValueError("it does not fit"), None),
        (FileNotFoundError("it is missing"), "train"),
        (ImportError("no module"), None),
        (TypeError("no function"), None),
    ],
)
def test_a_section_names_the_field_of_an_argument(error, field):
    with (
        pytest.raises(errors.SectionError) as caught,
        section("data", (TypeError,), file_field="train", memory_limit="memory_limit_gib"),
    ):
        raise error
    assert (caught.value.section, caught.value.field) == ("data", field)
    assert str(caught.value) == f"data: {error}" and caught.value.__cause__ is error


def test_a_section_lets_other_errors_pass():
    inner = errors.SectionError("model", None, "wrong")
    for error in (KeyError("x"), inner):
        with pytest.raises(type(error)) as caught, section("data"):
            raise error
        assert caught.value is error


class Device:
    def __init__(self, slice_index: int) -> None:
        self.slice_index = slice_index


MADE_UP = [Device(0), Device(0), Device(1), Device(1)]
CONFIG = """\
model: {kind: mlp}
data: {kind: digits}
mesh:
  data: 1
  stages: 3
"""


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("stages", lambda: arrange(MADE_UP, 1, 1)),
        ("stages", lambda: make_mesh(stages=0)),
        ("data", lambda: make_mesh(stages=1, data=0)),
        ("num_devices", lambda: generators.gpipe(0, 1)),
        ("micro_batches", lambda: generators.gpipe(1, 0)),
        ("kind", lambda: generators.make("2f2b", 1, 1)),
        ("chunks", lambda: generators.make("1f1b", 1, 1, 2)),
        ("schedule", lambda: generators.training_schedule("forward", 1, 1)),
        ("schedule", lambda: generators.training_schedule(generators.gpipe(2, 1), 1, 1)),
        ("schedule", lambda: generators.training_schedule(generators.forward_only(1, 1), 1, 1)),
        ("chunks", lambda: generators.training_schedule(generators.gpipe(1, 1), 1, 1, 2)),
        ("width", lambda: check_counts(width=0)),
        ("channels", lambda: unet(depth=1, convolutions=1, channels=3)),
        ("auxiliary_weight", lambda: classification(auxiliary_weight=-1.0)),
    ],
)
def test_errors_name_the_argument(argument, call):
    with pytest.raises(errors.ArgumentError) as caught:
        call()
    assert caught.value.argument == argument


def test_an_error_of_the_device_order_names_the_line_of_the_stages(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG)
    with pytest.raises(ConfigError) as caught, loader.locating(path, []), section("mesh"):
        arrange(MADE_UP, 3, 1)
    assert caught.value.problems[0].startswith(f"{path}:5: mesh: 3 stages x 1 replicas do not")
