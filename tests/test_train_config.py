from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfnets.errors import UserError
from nfnets.train.config import RunConfig


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"lr": -1}, ["lr=-1", "greater than 0"]),
        ({"lr": float("nan")}, ["lr=nan", "finite"]),
        ({"batch_size": 0}, ["batch_size=0", "greater than or equal to 1"]),
        ({"epochs": "many"}, ["epochs='many'", "integer"]),
        ({"momentum": 1.0}, ["momentum=1.0", "less than 1"]),
        ({"data": "mnits"}, ["data='mnits'", "did you mean mnist"]),
        ({"clipping": 0}, ["clipping=0", "greater than 0"]),
        ({"validation_fraction": 0.95}, ["validation_fraction=0.95", "less than 0.9"]),
        ({"momentun": 0.9}, ["momentun", "did you mean momentum"]),
        ({"batch_size": 6, "accumulation": 4}, ["accumulation=4", "divisor", "batch_size=6"]),
        ({"lr": 0.1, "min_lr": 0.2}, ["min_lr=0.2", "at most lr=0.1"]),
        ({"epochs": 2, "warmup_epochs": 3}, ["warmup_epochs=3", "epochs=2"]),
        ({"data": "imagefolder"}, ["data_dir"]),
        ({"method_options": [1]}, ["method_options=[1]", "dictionary"]),
        ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
        ({"precision": "fp8"}, ["precision='fp8'", "bf16"]),
        ({"batch_size": 6, "augment_repeats": 4}, ["augment_repeats=4", "divisor", "batch_size=6"]),
        ({"schedule": "steps"}, ["decay_epochs=()", "schedule='steps'"]),
        ({"decay_epochs": [3]}, ["decay_epochs=(3.0,)", "schedule='steps'"]),
        ({"schedule": "constant", "min_lr": 0.01}, ["min_lr=0.01", "schedule='cosine'"]),
        ({"random_erasing": 1.5}, ["random_erasing=1.5", "less than or equal to 1"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0", "less than 1"]),
        ({"sam_share": 0}, ["sam_share=0", "greater than 0"]),
        ({"randaugment_layers": -1}, ["randaugment_layers=-1", "greater than or equal to 0"]),
    ],
)
def test_faults_are_one_line_with_field_value_and_bound(fields, parts):
    with pytest.raises(UserError) as caught:
        RunConfig.create(**fields)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_every_field_is_described_and_bounded():
    for name, field in RunConfig.model_json_schema()["properties"].items():
        assert field.get("description"), name
        kinds = [field, *field.get("anyOf", [])]
        for kind in kinds:
            if kind.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(kind), name


def test_fingerprint_is_the_hash_of_what_decides(tmp_path: Path):
    config = RunConfig.create(method="nf", method_options={"alpha": 0.5})
    fields = config.model_dump(mode="json")
    speed = ("workers", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batch_size")
    for name in ("data_dir", "download", "verify_data", "unreadable_budget", *speed):
        del fields[name]
    expected = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert config.fingerprint() == expected
    same = RunConfig.create(
        **{**config.model_dump(), "workers": 3, "checkpoint_every": 7, "data_dir": tmp_path}
    )
    assert same.fingerprint() == expected


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr": 0.2}, {"method_options": {"a": 1}}, {"augment": "none"}, {"threads": 2}]
)
def test_fingerprint_moves_with_what_decides(change):
    base = RunConfig.create(method="nf")
    other = RunConfig.create(**{**base.model_dump(), **change})
    assert base.fingerprint() != other.fingerprint()
    assert [line.split(":")[0] for line in base.differences(other)] == list(change)


@given(st.floats(1e-6, 1e3), st.integers(0, 2**63 - 1), st.sampled_from(["none", "crop", "crop-flip"]))
def test_round_trip(lr: float, seed: int, augment: str):
    config = RunConfig.create(lr=lr, seed=seed, augment=augment)
    again = RunConfig.create(**json.loads(config.to_json()))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_read_refuses_what_is_no_configuration(tmp_path: Path):
    path = tmp_path / "config.json"
    for content in ('{"lr": ', "[1]", '{"lr": -1}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            RunConfig.read(path)
    path.write_text(RunConfig.create(lr=0.3).to_json())
    assert RunConfig.read(path).lr == 0.3


def test_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig.create().lr = 1.0
