"""A run goes on with other devices and another stage of ZeRO: the losses of the run that never changed."""

import hashlib

import pytest

from sdtrain.checkpoint.commit import read_manifest, verify

pytestmark = pytest.mark.slow

ZERO1, ZERO2 = ["devices=2", "strategy=deepspeed_zero1"], ["devices=2", "strategy=deepspeed_zero2"]
ZERO3 = ["devices=2", "strategy=deepspeed_zero3"]
FILES = ["ema.safetensors", "model.safetensors", "optimizer_00000.safetensors", "optimizer_00001.safetensors"]
FOUR = ["devices=4", "strategy=deepspeed_zero2"]


def continue_in(train_in_processes, directory, stage, attempts):
    for max_steps, overrides in attempts:
        done = train_in_processes(
            directory, f"stages=[{stage}]", f"{stage}.trainer.max_steps={max_steps}", "resume=must", *overrides
        )
    return done


def test_stage_2_from_one_to_two_to_four_to_one_and_through_all_of_zero(outcome, branch, train_in_processes):
    directory = branch("one", "diffusion", 6)
    attempts = [(12, ZERO1), (18, FOUR), (24, ZERO3), (27, ZERO1), (30, [])]
    done = continue_in(train_in_processes, directory, "diffusion", attempts)
    one = outcome("one", "diffusion").losses("diffusion")
    assert len(done.losses("diffusion")) == 30
    assert done.losses("diffusion") == pytest.approx(one, rel=1e-5)


def test_stage_1_from_one_to_two_and_back(outcome, branch, train_in_processes):
    directory = branch("one", "autoencoder", 3)  # the adversary has no state yet
    done = continue_in(train_in_processes, directory, "autoencoder", [(9, ZERO2), (15, []), (20, ["devices=2"])])
    assert done.losses("autoencoder")[:20] == pytest.approx(
        outcome("one", "autoencoder").losses("autoencoder")[:20], rel=1e-4
    )


@pytest.mark.parametrize(("kind", "stage"), [("zero1", "autoencoder"), ("zero3", "diffusion")])
def test_without_a_change_it_is_the_same_to_the_bit(outcome, branch, train_in_processes, kind, stage):
    attempts = [(30, {"zero1": ZERO1, "zero3": ZERO3}[kind])]
    done = continue_in(train_in_processes, branch(kind, stage, 17), stage, attempts)
    whole = outcome(kind, stage)
    assert done.losses(stage) == whole.losses(stage)
    for name in FILES:
        first, second = (hashlib.sha256((run.checkpoint(stage, 30) / name).read_bytes()) for run in (done, whole))
        assert first.hexdigest() == second.hexdigest(), name


def test_every_rank_commits_its_file(outcome):
    path = outcome("zero3", "diffusion").checkpoint("diffusion", 30)
    verify(path)
    manifest = read_manifest(path)
    assert sorted(manifest["files"]) == [*FILES, "training.pt"]
    assert manifest["world_size"] == 2
    sizes = [manifest["files"][name]["bytes"] for name in FILES[2:]]
    assert max(sizes) < 1.1 * min(sizes)
