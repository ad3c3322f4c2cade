"""Tests the example of a new question: its answers are true, and LoRA alone learns it."""

from safetensors.torch import load_file

from recipe import lora_new_question
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
