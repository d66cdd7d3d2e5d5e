"""Reading configurations: bases, overrides, and every kind of fault with its place, path and remedy."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gr.config import RetrievalConfig, dump_config, json_schema, load_config
from gr.config.load import RECIPES
from gr.errors import ConfigError

BASE = """\
run_dir: runs/x
data: {path: data/ml}
model:
  tower: {kind: hstu, qk_dim: 64, layers: 4}
optimizer:
  lr: 1e-3
  schedule: {kind: linear, warmup_steps: 10}
trainer:
  steps: 100
"""

TYPES = "data_parallel, table_wise, column_wise, row_wise, table_row_wise, table_column_wise, grid_shard)"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def child(text: str) -> str:
    return write("child.yaml", f"base: base.yaml\n{text}")


def fault(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


class TestMerging:
    def test_file_alone(self):
        config = load_config("base.yaml")
        assert (config.trainer.steps, config.model.tower.qk_dim, config.seed) == (100, 64, 1)

    def test_sections_merge_and_values_replace(self):
        config = load_config(child("trainer: {log_every: 5}\noptimizer: {betas: [0.5, 0.6]}"))
        assert (config.trainer.steps, config.trainer.log_every) == (100, 5)
        assert (config.optimizer.betas, config.optimizer.lr) == ((0.5, 0.6), 1e-3)

    def test_lists_replace(self):
        write("base.yaml", BASE + "evaluation: {baselines: [popularity, markov]}\n")
        assert load_config(child("evaluation: {baselines: [item_knn]}")).evaluation.baselines == ("item_knn",)

    def test_later_bases_win_and_the_file_wins_over_all(self):
        write("b.yaml", "seed: 2\ntrainer: {steps: 7}")
        path = write("c.yaml", "base: [base.yaml, b.yaml]\nseed: 3")
        assert (load_config(path).seed, load_config(path).trainer.steps) == (3, 7)

    def test_base_is_relative_to_the_file_that_names_it(self):
        write("common/one.yaml", "base: two.yaml\nseed: 5")
        write("common/two.yaml", BASE)
        assert load_config(write("deep/er/c.yaml", "base: ../../common/one.yaml")).seed == 5

    def test_one_base_reached_twice_is_no_cycle(self):
        write("l.yaml", "base: base.yaml\nseed: 2")
        write("r.yaml", "base: base.yaml\ndevice: cpu")
        config = load_config(write("d.yaml", "base: [l.yaml, r.yaml]"))
        assert (config.seed, config.device) == (2, "cpu")

    def test_empty_file_with_base_only_in_comments_is_an_empty_mapping(self):
        assert "run_dir: required, but not set" in fault(write("e.yaml", "# nothing yet\n"))


class TestKind:
    def test_changed_kind_drops_the_old_kinds_keys(self):
        tower = load_config(child("model: {tower: {kind: sasrec}}")).model.tower
        assert (tower.kind, tower.layers) == ("sasrec", 2)

    def test_same_kind_keeps_them(self):
        tower = load_config(child("model: {tower: {kind: hstu, layers: 1}}")).model.tower
        assert (tower.layers, tower.qk_dim) == (1, 64)

    def test_override_changes_kind(self):
        assert load_config("base.yaml", ["model.tower.kind=sasrec"]).model.tower.kind == "sasrec"

    @pytest.mark.parametrize("swap", [False, True])
    def test_order_of_overrides_does_not_matter_to_a_changed_kind(self, swap):
        overrides = ["model.tower.ffn_dim=9", "model.tower.kind=sasrec"]
        tower = load_config("base.yaml", overrides[::-1] if swap else overrides).model.tower
        assert (tower.kind, tower.ffn_dim) == ("sasrec", 9)

    def test_kind_may_stay_unsaid(self):
        assert load_config("base.yaml", ["task.negatives.count=7"]).task.negatives.kind == "per_position"

    def test_unsaid_kind_counts_when_it_changes(self):
        write("base.yaml", BASE + "task: {negatives: {count: 7}}\n")
        assert load_config("base.yaml", ["task.negatives.kind=full"]).task.negatives.kind == "full"
        assert load_config("base.yaml", ["task.negatives.kind=per_position"]).task.negatives.count == 7

    def test_kind_that_chooses_no_variant_drops_nothing(self):
        schedule = load_config("base.yaml", ["optimizer.schedule.kind=cosine"]).optimizer.schedule
        assert (schedule.kind, schedule.warmup_steps) == ("cosine", 10)

    def test_keys_of_the_old_kind_written_after_the_change_are_faults(self):
        said = fault("base.yaml", "model.tower.kind=sasrec", "model.tower.qk_dim=3")
        assert "override 'model.tower.qk_dim=3': model.tower.qk_dim: unknown key" in said
        assert "ffn_dim" in said
        assert "time_buckets" not in said


class TestValues:
    @pytest.mark.parametrize(
        ("text", "value"), [("1e-3", 1e-3), ("1.e-3", 1e-3), ("2E+1", 20.0), (".5", 0.5), ("3", 3.0), ("1_0.5", 10.5)]
    )
    def test_numbers(self, text, value):
        assert load_config("base.yaml", [f"optimizer.lr={text}"]).optimizer.lr == value
        assert load_config(child(f"optimizer: {{lr: {text}}}")).optimizer.lr == value

    def test_thousands(self):
        assert load_config("base.yaml", ["trainer.steps=1_000_000"]).trainer.steps == 1_000_000

    @pytest.mark.parametrize("text", ["2026-01-02", "1:30", "no", "on", "010x", "e5"])
    def test_text_that_yaml_1_1_would_change_stays_text(self, text):
        assert load_config("base.yaml", [f"run_dir={text}"]).run_dir == text

    def test_values_are_yaml(self):
        config = load_config(
            "base.yaml",
            ["optimizer.betas=[0.1, 0.2]", "planner.tables={a.b: row_wise}", "checkpoint.every=", "run_dir=a=b"],
        )
        assert config.optimizer.betas == (0.1, 0.2)
        assert config.planner.tables == {"a.b": "row_wise"}
        assert config.checkpoint.every is None
        assert config.run_dir == "a=b"

    def test_later_override_wins(self):
        assert load_config("base.yaml", ["seed=2", "seed=3"]).seed == 3

    def test_nothing_in_a_file_is_executed(self):
        said = fault(child("run_dir: !!python/object/apply:os.system ['touch ran']"))
        assert said.startswith(
            "child.yaml:2: YAML tags (tag:yaml.org,2002:python/object/apply:os.system) are not supported"
        )
        assert not Path("ran").exists()


class TestFaults:
    """`said` is the whole message, so the place, the path and the remedy are all held."""

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                "trainer: {stps: 5}",
                "trainer.stps: unknown key; did you mean 'steps'? (known: epochs, global_batch_size, ",
            ),
            ("zzz: 5", "zzz: unknown key; known: callbacks, checkpoint, "),
            ("seed: -1", "seed: should be greater than or equal to 0, got -1"),
            ("seed: abc", "seed: expected an integer, got 'abc'"),
            ("seed: '3'", "seed: expected an integer, got '3'"),
            ("seed: true", "seed: expected an integer, got true"),
            ("seed: 1.5", "seed: expected an integer, got 1.5"),
            ("trainer: {steps: 1e5}", "trainer.steps: expected an integer, got 100000.0; write 100000"),
            ("optimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast'"),
            ("data: {shuffle: yes}", "data.shuffle: expected true or false, got 'yes'"),
            ("run_dir: 5", "run_dir: expected text, got 5"),
            ("run_dir:", "run_dir: expected text, got nothing (null)"),
            ("trainer:", "trainer: expected a section of `key: value` lines, got nothing (null)"),
            ("trainer: [1]", "trainer: expected a section of `key: value` lines, got [1]"),
            ("trainer: {profiler: 5}", "trainer.profiler: expected a section of `key: value` lines, got 5"),
            ("model: {tower: hstu}", "model.tower: expected a section of `key: value` lines, got 'hstu'"),
            ("planner: {tables: x}", "planner.tables: expected a section of `key: value` lines, got 'x'"),
            ("seed: {a: 1}", "seed: expected an integer, got a section"),
            ("optimizer: {betas: 3}", "optimizer.betas: expected a list, like [a, b], got 3"),
            ("optimizer: {betas: [0.1]}", "optimizer.betas.1: required, but not set"),
            ("optimizer: {betas: [0.1, 0.2, 0.3]}", "optimizer.betas: expected 2 items, got 3"),
            ("optimizer: {betas: [0.1, 2]}", "optimizer.betas.1: should be less than 1, got 2"),
            ("device: gpu", "device: 'gpu' is not allowed; did you mean 'cpu'? (allowed: auto, cpu, cuda)"),
            (
                "planner: {sharding: row_wis}",
                "planner.sharding: 'row_wis' is not allowed; did you mean 'row_wise'? (allowed: auto, " + TYPES,
            ),
            (
                "planner: {tables: {item: rows}}",
                "planner.tables.item: 'rows' is not allowed; did you mean 'row_wise'? (allowed: " + TYPES,
            ),
            (
                "evaluation: {baselines: [popularity, knn]}",
                "evaluation.baselines.1: 'knn' is not allowed; allowed: popularity, item_knn, markov, ease",
            ),
            (
                "model: {tower: {kind: hstuu}}",
                "model.tower.kind: unknown kind 'hstuu'; did you mean 'hstu'? (allowed: hstu, sasrec, stu, llama)",
            ),
            (
                "model: {tower: {kind:}}",
                "model.tower.kind: unknown kind nothing (null); allowed: hstu, sasrec",
            ),
            ("model: {tower: {layers: 0}}", "model.tower.layers: should be greater than 0, got 0"),
            ("5: x", "key 5 is not text; put it in quotes"),
            ("true: x", "key true is not text; put it in quotes"),
            ("[a]: x", "key of this entry is not text; put it in quotes"),
            ("seed: [3", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
            ("seed: *x", "YAML aliases (*name) are not supported; write the value again or share it by `base:`"),
            (
                "seed: !!timestamp 2026-01-01",
                "YAML tags (tag:yaml.org,2002:timestamp) are not supported; write the plain",
            ),
            ("seed: .nan", "not a usable value: .nan is not a finite number"),
            ("optimizer: {lr: 1e999}", "not a usable value: 1e999 is not a finite number"),
            ('run_dir: "\\ud800"', "not a usable value: text with half of a surrogate pair"),
            ("<<: {seed: 3}", "<<: unknown key; known: callbacks"),
            (f"seed: {'[' * 60}{']' * 60}", "nested more than 50 levels deep"),
            (f"seed: {'9' * 5000}", "not a usable value: Exceeds the limit"),
        ],
    )
    def test_message(self, text, said):
        message = fault(child(text))
        assert message.startswith(f"child.yaml:2: {said}")
        assert "\n" not in message

    def test_required(self):
        assert fault(write("m.yaml", "run_dir: r\ndata:\n  lanes: 8\ntrainer: {steps: 5}")) == (
            "m.yaml:2: data.path: required, but not set"
        )

    def test_steps_or_epochs(self):
        text = "run_dir: r\ndata: {path: d}\ntrainer:\n"
        assert fault(write("m.yaml", text + "  log_every: 3")) == (
            "m.yaml:3: trainer: steps and epochs are both unset: set one of them"
        )
        assert fault(write("m.yaml", text + "  steps: 3\n  epochs: 2")) == (
            "m.yaml:4, m.yaml:5: trainer: steps=3 and epochs=2: set one of them, the other to null"
        )
        path = write("m.yaml", text + "  steps: 3")
        assert load_config(path, ["trainer.steps=null", "trainer.epochs=2"]).trainer.epochs == 2

    def test_rule_between_keys_points_at_the_keys_that_are_written(self):
        write("base.yaml", BASE + "data: {path: d, lanes: 7}\n".replace("data:", "data2:"))
        said = fault(child("data:\n  lanes: 7\ntrainer:\n  global_batch_size: 8"), "data.lanes=5")
        assert "data2: unknown key; did you mean 'data'?" in said
        Path("base.yaml").write_text(BASE)
        said = fault(child("data:\n  lanes: 7\ntrainer:\n  global_batch_size: 8"), "data.lanes=5")
        assert said == (
            "child.yaml:5, override 'data.lanes=5': trainer.global_batch_size=8 is not divisible by data.lanes=5"
        )

    def test_rule_inside_a_section(self):
        said = fault(child("model: {tower: {attention: softmax}}"))
        assert said.startswith("child.yaml:2: model.tower: attention=softmax takes no relative bias; set position_bias")

    def test_all_faults_at_once_from_all_sources(self):
        write("base.yaml", BASE + "seed: x\nseed: y\n")
        lines = fault(child("devise: cpu"), "trainer.steps=0", "oops").splitlines()
        assert lines[0] == "5 faults in the configuration child.yaml"
        assert sorted(line.strip().partition(": ")[0] for line in lines[1:]) == [
            "base.yaml:10",
            "base.yaml:11",
            "child.yaml:2",
            "override 'oops'",
            "override 'trainer.steps=0'",
        ]

    def test_duplicate_key_names_both_lines(self):
        assert fault(write("d.yaml", BASE + "seed: 1\nseed: 2\n")) == (
            "d.yaml:11: duplicate key 'seed', first at line 10; keep one"
        )

    def test_nested_duplicate_key(self):
        assert "d.yaml:10: duplicate key 'steps', first at line 9" in fault(write("d.yaml", BASE + "  steps: 2\n"))

    @pytest.mark.parametrize("override", ["trainer.steps", "=3", "a..b=3", ".a=3", "trainer.=3"])
    def test_malformed_override(self, override):
        assert f"override '{override}': expected a.b.c=value" in fault("base.yaml", override)

    def test_override_with_broken_yaml(self):
        assert fault("base.yaml", "seed={").startswith("override 'seed={': not valid YAML: ")

    def test_override_through_a_value(self):
        assert fault("base.yaml", "seed.x=3") == "override 'seed.x=3': seed: expected an integer, got a section"

    def test_override_of_base(self):
        assert "override 'base=x.yaml': base: unknown key" in fault("base.yaml", "base=x.yaml")

    def test_long_override_and_value_are_cut(self):
        assert len(fault("base.yaml", f"seed={'x' * 500}")) < 250


class TestFiles:
    def test_missing(self):
        assert fault("nope.yaml") == "nope.yaml: no such file"

    def test_folder(self):
        assert fault(".") == ".: cannot be read: Is a directory"

    def test_not_text(self):
        Path("b.yaml").write_bytes(b"\xff\xfe\x00")
        assert fault("b.yaml") == "b.yaml: cannot be read: not UTF-8 text (byte 0)"

    def test_control_character(self):
        assert fault(write("b.yaml", "a: \x01")).startswith("b.yaml:1: not valid YAML: ")

    @pytest.mark.parametrize(("text", "got"), [("- a\n- b", "['a', 'b']"), ("hello", "'hello'"), ("3", "3")])
    def test_top_level(self, text, got):
        assert fault(write("l.yaml", text)) == f"l.yaml:1: top level must be `key: value` lines, got {got}"

    def test_two_documents(self):
        assert "t.yaml:2: not valid YAML: but found another document" == fault(write("t.yaml", "a: 1\n---\nb: 2"))

    @pytest.mark.slow
    def test_extreme_nesting(self):
        assert fault(write("n.yaml", "[" * 100_000)) == "n.yaml:1: nested more than 50 levels deep"

    def test_missing_base(self):
        assert fault(write("c/x.yaml", "seed: 1\nbase: y.yaml")) == "c/x.yaml:2: base: no such file: c/y.yaml"

    def test_base_that_is_no_name(self):
        assert fault(write("x.yaml", "base: {a: 1}")) == (
            "x.yaml:1: base: expected a file name or a list of them, got {'a': 1}"
        )
        assert "base: expected a file name" in fault(write("x.yaml", "base: [base.yaml, 3]"))

    def test_base_cycle(self):
        write("a.yaml", "base: b.yaml")
        write("b.yaml", "\nbase: ./a.yaml")
        assert fault("a.yaml") == "b.yaml:2: base: cycle: a.yaml -> b.yaml -> a.yaml"

    def test_file_that_is_its_own_base(self):
        assert fault(write("s.yaml", "base: s.yaml")) == "s.yaml:1: base: cycle: s.yaml -> s.yaml"

    def test_faults_of_several_files(self):
        write("a.yaml", "x: [")
        write("b.yaml", "- 1")
        said = fault(write("c.yaml", "base: [a.yaml, b.yaml, d.yaml]"))
        assert [line.split(":")[0].strip() for line in said.splitlines()[1:]] == ["a.yaml", "b.yaml", "c.yaml"]


class TestDump:
    @pytest.mark.slow
    @given(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).filter(lambda t: t[0] != "~")
        | st.sampled_from(["1e-3", "no", "null", "1_0"]),
        st.floats(1e-12, 1e12),
        st.dictionaries(st.text("ab.~1"), st.sampled_from(["row_wise", "table_wise"]), max_size=3),
    )
    def test_round_trip(self, run_dir, lr, tables):
        config = load_config("base.yaml")
        optimizer = config.optimizer.model_copy(update={"lr": lr})
        planner = config.planner.model_copy(update={"tables": tables})
        config = config.model_copy(update={"run_dir": run_dir, "optimizer": optimizer, "planner": planner})
        Path("dumped.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config("dumped.yaml") == config

    def test_is_plain_yaml_in_the_order_of_the_tree(self):
        text = dump_config(load_config("base.yaml"))
        assert list(yaml.safe_load(text)) == list(RetrievalConfig.model_fields)
        assert "betas: [0.9, 0.98]" in text


class TestSchema:
    def test_is_json_and_knows_base(self):
        schema = json.loads(json.dumps(json_schema()))
        for kind in schema["anyOf"]:
            of_kind = schema["$defs"][kind["$ref"].rpartition("/")[2]]
            assert of_kind["properties"]["base"]
            assert of_kind["additionalProperties"] is False
        assert len(schema["anyOf"]) == len(list(RECIPES)) == 5

    def test_refuses_nothing_that_loads(self):
        text = json.dumps(json_schema())
        assert '"required"' not in text  # may come from a base
        assert '"oneOf"' not in text  # a section without `kind` fits several variants
