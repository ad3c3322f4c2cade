"""Tests the example of a new question: its answers are true, LoRA alone learns it, and lm-eval reads its rows."""

from datasets import load_dataset
from safetensors.torch import load_file

from recipe import lora_new_question
from recipe.lm_eval_task import write_scenes
from theworld.evaluation.scenes import KINDS, SPLITS, draw_scene


def test_the_smallest_object_is_the_answer():
    for seed, scene, question in lora_new_question.scenes_with_a_smallest("test", 20):
        assert seed in SPLITS["test"] and draw_scene(seed).things == scene.things
        radii = {thing.colour: thing.radius for thing in scene.things}
        assert question.answer == min(radii, key=radii.get) and question.kind not in KINDS


def test_a_short_run_trains_lora_alone_and_reports(tmp_path):
    report = lora_new_question.main(tmp_path / "run", scenes=64, epochs=4, tested=20, per_old_kind=2)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name and "language_model.layers" in name for name in adapter)
    assert report["adapter bytes"] < 1e6 and report["before"]["new"]["share"] < 0.3
    assert report["after"]["old"]["total"] == 18 and report["after"]["new"]["right"] > report["before"]["new"]["right"]


def test_lm_eval_rows_have_image_question_and_answer(tmp_path):
    write_scenes(tmp_path / "test.parquet", per_kind=2)
    rows = load_dataset("parquet", data_files={"test": str(tmp_path / "test.parquet")}, split="test")
    assert len(rows) == 18 and set(rows["kind"]) == set(KINDS)
    assert rows[0]["image"].size == (64, 64) and rows[0]["answer"] in KINDS[rows[0]["kind"]]
