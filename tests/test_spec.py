"""Pipelines as YAML: the same as in Python, and every mistake told in one line with its place."""

import json
from typing import Any

import pytest
from streams import make_model

import dynkit as dk
from dynkit.errors import SpecError
from dynkit.pipeline import build, schema
from dynkit.yaml import parse

GOOD = """\
dataset: stream
model: make_model
trigger: {amount: {n: 500}}
selection: {random: {fraction: 0.8}}
training: {epochs: 1, batch_size: 64, lr: 1e-2, warm_start: true}
evaluation:
  windows: {tumbling: 3d}
  metrics: [accuracy, roc_auc]
seed: 3
"""


def own_trigger(new: Any, run: Any) -> bool:
    return True


NAMES: dict[str, Any] = {"make_model": make_model, "own_trigger": own_trigger, "n": 5, "rate": 0.1, "numbered": {1: 2}}


def built(ws: dk.Workspace, text: str, **options: Any) -> dk.Pipeline:
    return build(text, ws.catalog, **{"name": "test", "namespace": NAMES, **options})


def test_yaml_is_the_python_constructors_spelled_differently(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    in_python = dk.Pipeline(
        name="test",
        dataset=dataset,
        model=make_model,
        trigger=dk.triggers.Amount(500),
        selection=dk.selection.Random(fraction=0.8),
        training=dk.Training(epochs=1, batch_size=64, lr=1e-2, warm_start=True),
        evaluation=dk.Evaluation(
            windows=dk.windows.Tumbling("3d"), metrics=[dk.metrics.Accuracy(), dk.metrics.RocAuc()]
        ),
        seed=3,
    )
    in_yaml = built(ws, GOOD)
    assert in_yaml.describe() == in_python.describe()
    assert in_yaml.digest() == in_python.digest()


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("{amount: {n: 500}}", "{amount: 500}", lambda p: p.trigger == dk.triggers.Amount(500)),
        ("{amount: {n: 500}}", "{amount: $n}", lambda p: p.trigger == dk.triggers.Amount(5)),
        ("{amount: {n: 500}}", "own_trigger", lambda p: p.trigger is own_trigger),
        (
            "{amount: {n: 500}}",
            "{drift: {metric: mmd, every: 5000, criterion: {threshold: 0.1}, on: fields, reference: 4d}}",
            lambda p: (
                p.trigger
                == dk.triggers.Drift(every=5000, criterion=dk.drift.Threshold(0.1), on="fields", reference="4d")
            ),
        ),
        (
            "{amount: {n: 500}}",
            "{drift: {metric: {energy: {rows: 100}}, on: own_trigger, warmup: {amount: 5}, warmup_looks: 3}}",
            lambda p: (
                p.trigger
                == dk.triggers.Drift(dk.drift.Energy(100), on=own_trigger, warmup=dk.triggers.Amount(5), warmup_looks=3)
            ),
        ),
        (
            "{amount: {n: 500}}",
            "{any_of: [{amount: 5}, {all_of: [{time: 1d}, own_trigger]}]}",
            lambda p: (
                p.trigger
                == dk.triggers.any_of(
                    dk.triggers.Amount(5), dk.triggers.all_of(dk.triggers.Time("1d"), own_trigger)
                )
            ),
        ),
        (
            "{amount: {n: 500}}",
            "{performance: {metric: roc_auc, criterion: {dynamic_quantile: 0.1}, mode: lookahead}}",
            lambda p: (
                p.trigger
                == dk.triggers.Performance(
                    "roc_auc", criterion=dk.drift.DynamicQuantile(0.1), mode="lookahead"
                )
            ),
        ),
        (
            "{amount: {n: 500}}",
            "{cost: {rate: 10.0, training_s: own_trigger}}",
            lambda p: p.trigger == dk.triggers.Cost(10.0, training_s=own_trigger),
        ),
        ("{amount: {n: 500}}", "test_spec:own_trigger", lambda p: p.trigger is own_trigger),
        ("{amount: {n: 500}}", "{'dynkit.triggers:Time': {every: 1mo}}", lambda p: p.trigger == dk.triggers.Time("1mo")),
        ("{amount: {n: 500}}", "{time: {every: 30d, start: 2013-01-01}}", lambda p: p.trigger.start == "2013-01-01"),
        ("{random: {fraction: 0.8}}", "new", lambda p: p.selection == dk.selection.New()),
        ("{random: {fraction: 0.8}}", "{all: }", lambda p: p.selection == dk.selection.All()),
        ("{random: {fraction: 0.8}}", "{random: {n: 1_000}}", lambda p: p.selection == dk.selection.Random(n=1000)),
        ("model: make_model", "model: {torch.nn:Linear: {in_features: 3, out_features: 2}}", lambda p: p.model().in_features == 3),
        ("{tumbling: 3d}", "between_triggers", lambda p: p.evaluation.windows == dk.windows.BetweenTriggers()),
        ("[accuracy, roc_auc]", "[top_3, {f1: {average: micro}}]", lambda p: p.evaluation.metrics[1].average == "micro"),
        ("[accuracy, roc_auc]", "[accuracy]\n  slices: [label]", lambda p: p.evaluation.slices == ["label"]),
        ("lr: 1e-2", "lr: $rate", lambda p: p.training.lr == 0.1),
        ("lr: 1e-2", "optimizer: sgd, schedule: cosine, loss: own_trigger", lambda p: p.training.loss is own_trigger),
        ("epochs: 1", "patience: 2, validation: 0.1, grad_clip: null", lambda p: p.training.patience == 2),
        ("seed: 3", "", lambda p: p.seed == 0),
    ],
)  # fmt: skip
def test_other_spellings(ws: dk.Workspace, dataset: dk.Dataset, old: str, new: str, check: Any) -> None:
    assert check(built(ws, GOOD.replace(old, new)))


def test_the_device_and_name_may_come_from_outside(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    assert built(ws, GOOD, device="cpu").training.device == "cpu"
    assert built(ws, "name: inside\n" + GOOD, name=None).name == "inside"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dataset: stream", "dataset: steam", r"line 1: dataset: no dataset 'steam' in .*; did you mean 'stream'\?"),
        ("dataset: stream", "dataset: [stream]", r"line 1: dataset: \['stream'\] is not a dataset name; expected text"),
        ("dataset: stream", "", r"key 'dataset' is missing; a pipeline needs dataset, model, trigger, selection"),
        ("epochs", "epoch", r"line 5: training.epoch: key 'epoch' is not known; did you mean 'epochs'\?"),
        (
            "model: make_model",
            "model: {torch.nn:Linear: {in_feature: 3}}",
            r"line 2: model.*key 'in_feature' is not known; did you mean 'in_features'",
        ),
        (
            "model: make_model",
            "model: torch.nn:Linear",
            r"line 2: model: .* missing a required argument: 'in_features'",
        ),
        ("{amount: {n: 500}}", "&again [*again]", r"an anchor of the YAML contains itself"),
        ("epochs: 1", "epochs: three", r"line 5: training.epochs: 'three' is not valid; expected a whole number"),
        ("epochs: 1", "epochs: true", r"line 5: training.epochs: True is not valid; expected a whole number"),
        ("epochs: 1", "epochs: 0", r"line 5: training.epochs: epochs=0 must be a whole number, at least 1"),
        ("lr: 1e-2", "lr: fast", r"line 5: training.lr: 'fast' is not valid; expected a number"),
        (
            "lr: 1e-2",
            "loss: crossentropy",
            r"line 5: training.loss: .*'crossentropy' is not known; did you mean 'cross_ent",
        ),
        ("lr: 1e-2", "optimizer: adm", r"line 5: training.optimizer: .*'adm' is not known; did you mean 'adam'\?"),
        ("lr: 1e-2", "device: 3", r"line 5: training.device: 3 is not valid; expected text"),
        (
            "warm_start: true",
            "warm_start: yes",
            r"line 5: training.warm_start: 'yes' is not valid; expected true or false",
        ),
        (
            "{amount: {n: 500}}",
            "{amont: {n: 500}}",
            r"line 3: trigger: trigger 'amont' is not known; did you mean 'amount'\?",
        ),
        ("{amount: {n: 500}}", "{drift: {metric: mmmd}}", r"line 3: trigger.drift.*'mmmd'.*'mmd'"),
        ("{amount: {n: 500}}", "{drift: {criterion: {treshold: 1}}}", r"did you mean 'threshold'"),
        ("{amount: {n: 500}}", "{drift: {criterion: {threshold: high}}}", r"line 3: trigger.drift.criterion.threshold"),
        ("{amount: {n: 500}}", "{any_of: {amount: 5}}", r"line 3: trigger.any_of: .* is not a list of triggers"),
        ("{amount: {n: 500}}", "{any_of: [{amont: 5}]}", r"line 3: trigger.any_of.0.*did you mean 'amount'"),
        ("{amount: {n: 500}}", "{at_least: {n: 3, triggers: [{amount: 5}]}}", r"n=3 votes cannot come from 1"),
        ("{amount: {n: 500}}", "{amount: {m: 500}}", r"line 3: trigger.amount.m: key 'm' is not known; "),
        (
            "{amount: {n: 500}}",
            "{amount: {}}",
            r"line 3: trigger.amount: parameter 'n' is missing; write \{amount: \{n: ...\}\}",
        ),
        (
            "{amount: {n: 500}}",
            "{amount: {n: 0.5}}",
            r"line 3: trigger.amount.n: 0.5 is not valid; expected a whole number",
        ),
        ("{amount: {n: 500}}", "{amount: -1}", r"line 3: trigger.amount: n=-1 must be a whole number, at least 1"),
        ("{amount: {n: 500}}", "{amount: 5, time: 3d}", r"line 3: trigger: 2 keys \(amount, time\) is not one trigger"),
        ("{amount: {n: 500}}", "[amount]", r"line 3: trigger: \['amount'\] is not one trigger; expected a name"),
        (
            "{amount: {n: 500}}",
            "{time: 30 days}",
            r"line 3: trigger.time: every: '30 days' is not a duration; write a number and",
        ),
        (
            "{amount: {n: 500}}",
            "{time: {every: 30d, start: soon}}",
            r"line 3: trigger.time: 'soon' is not a time; write it like",
        ),
        (
            "{amount: {n: 500}}",
            "own_triger",
            r"line 3: trigger: trigger 'own_triger' is not known; did you mean 'own_trigger'\?",
        ),
        (
            "{amount: {n: 500}}",
            "zzz",
            r"line 3: trigger: trigger 'zzz' is not known; expected one of amount, time, drift, performance, cost, at_least, any_of, all_of, majority, a notebook's",
        ),
        ("{amount: {n: 500}}", "n", r"line 3: trigger: 'n' is 5, not a function"),
        ("{amount: {n: 500}}", "make_model", r"line 3: .*trigger=make_model cannot be called with \(new, run\)"),
        (
            "{amount: {n: 500}}",
            "nowhere:f",
            r"line 3: trigger: 'nowhere:f' cannot be imported: No module named 'nowhere'",
        ),
        ("{amount: {n: 500}}", "math:zin", r"line 3: trigger: 'math:zin' cannot be imported: .*no attribute 'zin'"),
        ("{amount: {n: 500}}", "{amount: $m}", r"line 3: trigger.amount: '\$m': no variable 'm' in the notebook"),
        ("0.8", "1.8", r"line 4: selection.random.fraction: fraction=1.8 must be in \(0, 1\]"),
        ("0.8", "0.8, n: 3", r"line 4: selection.random: give either fraction or n"),
        ("{random: {fraction: 0.8}}", "{all: 3}", r"line 4: selection.all: all takes no parameters, not 3"),
        ("3d", "3x", r"line 7: evaluation.windows.tumbling: every: '3x' is not a duration"),
        ("accuracy", "acuracy", r"line 8: evaluation.metrics.0: .*'acuracy' is not known; did you mean 'accuracy'\?"),
        ("[accuracy, roc_auc]", "accuracy", r"line 8: evaluation.metrics: 'accuracy' is not a list"),
        ("[accuracy, roc_auc]", "[accuracy]\n  slices: label", r"line 9: evaluation.slices: 'label' is not a list"),
        ("[accuracy, roc_auc]", "[accuracy]\n  slices: [lable]", r"slices has 'lable', .*did you mean 'label'\?"),
        (
            "[accuracy, roc_auc]",
            "[accuracy, accuracy]",
            r"line 8: evaluation.metrics: metrics=.* must have different names",
        ),
        ("evaluation:\n", "evaluation: 3\nmore:\n", r"line \d: (evaluation: 3 is not evaluation|more: key)"),
        ("seed: 3", "seed: -3", r"line 9: seed: seed=-3 must be a whole number, at least 0"),
        ("seed: 3", "sede: 3", r"line 9: sede: key 'sede' is not known; did you mean 'seed'\?"),
        ("seed: 3", "seed: 3\nseed: 4", r"line 10: key 'seed' is given twice; keep one"),
        ("seed: 3", "seed: {{ seed }}", r"line 9: a key must be text; .* write \$name"),
        ("seed: 3", "? [a, b]\n: 3", r"line 9: a key must be text"),
        ("seed: 3", "seed: \x07", r"not valid YAML: unacceptable character"),
        ("seed: 3", "seed: !!int abc", r"not valid YAML: invalid literal"),
        ("seed: 3", "seed: !!timestamp abc", r"not valid YAML: "),
        ("{amount: {n: 500}}", "$numbered", r"trigger: 1 keys \(1\) is not one trigger"),
        ("{amount: {n: 500}}", "{amount: $numbered}", r"trigger.amount: key 1 must be text"),
        ("seed: 3", "3: seed", r"line 9: key 3 must be text"),
        ("{amount: {n: 500}}", "{amount: {n: 500}", r"line \d: not valid YAML: "),
        ("seed: 3", "\tseed: 3", r"line \d+: not valid YAML: "),
        (GOOD, "", r"nothing is not a pipeline; expected keys: name, dataset"),
        (GOOD, "- a\n- b", r"line 1: \['a', 'b'\] is not a pipeline"),
        (GOOD, "just text", r"line 1: 'just text' is not a pipeline"),
    ],
)
def test_every_mistake_is_one_line_with_its_place(
    ws: dk.Workspace, dataset: dk.Dataset, old: str, new: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        built(ws, GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


def test_a_name_is_needed(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    with pytest.raises(SpecError, match="key 'name' is missing"):
        built(ws, GOOD, name=None)
    with pytest.raises(SpecError, match="name 'a b'"):
        built(ws, GOOD, name="a b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1.5e3", 1500.0), (".5", 0.5), ("25_000", 25_000), ("-3", -3), ("on", "on"), ("no", "no"), ("true", True),
        ("2013-02-01", "2013-02-01"), ("~", None), ("12:30", "12:30"), ("0x10", "0x10"), ("1.2.3", "1.2.3"), ("e", "e"), ("010", 10),
    ],
)  # fmt: skip
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    found = parse(f"a: {text}").value["a"]
    assert found == value
    assert type(found) is type(value)


def test_the_schema_accepts_what_is_valid_and_is_plain_json() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    found = json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(found)
    check = jsonschema.Draft202012Validator(found)
    document = parse(GOOD).value
    check.validate(document)
    check.validate({**document, "trigger": {"package.module:Mine": {"samples": 5}}})
    for wrong in (
        {**document, "sede": 3},
        {**document, "seed": -1},
        {**document, "training": {"epoch": 1}},
        {**document, "trigger": {"amount": {"samples": 5}}},
        {**document, "trigger": {"amount": 5, "time": "1d"}},
        {**document, "trigger": {}},
        {"dataset": "d"},
    ):
        assert not check.is_valid(wrong)
    amount = next(x for x in found["properties"]["trigger"]["anyOf"] if "amount" in x.get("properties", {}))
    assert amount["properties"]["amount"]["anyOf"][0]["required"] == ["n"]
