"""Training and evaluation: folds that share nothing, weights that balance, copies that count right, modules of ours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from gpuguard.code import dataset, evaluation, modules, train
from gpuguard.code.classify import Calibration
from gpuguard.kernels import opcodes
from gpuguard.kernels.opcodes import COLUMN

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dataset.Kernels:
    folder = tmp_path_factory.mktemp("cubins")
    for name in ("sha256d", "cryptonight", "siptrim", "gemm", "database", "rng"):
        (folder / f"{name}.sm_90.cubin").symlink_to(FIXTURES / "cubins" / f"{name}.sm_90.cubin")
    return modules.load(folder, FIXTURES / "cuda" / "families.csv")


def test_modules_have_their_family_and_their_parts(own):
    assert set(own.group) == {"own-sha2", "own-cryptonight", "own-cuckoo", "own-gemm", "own-database", "own-random"}
    assert own.own().all()
    assert not own.listed().any()
    assert set(own.label[own.group == "own-sha2"]) == {"mining"}
    counts, owners = own.parts()
    assert len(counts) == len(owners) == sum(len(facts.parts) for facts in own.facts)
    assert (counts[:, 0] >= 48).all()
    assert (np.diff(owners) >= 0).all()


def test_a_group_is_in_one_fold(own):
    table = own._replace(project=np.array(["p"] * len(own.facts)), group=own.module)
    both = table.joined(own)
    fold = dataset.folds(both)
    for name in set(both.group):
        assert len(set(fold[both.group == name])) == 1
    assert set(fold) == set(range(len(set(table.group[table.hashing]))))


def test_both_classes_weigh_the_same():
    hashing = np.array([True, False, False, False, True])
    weight = train.balanced(hashing, np.array([1.0, 1.0, 1.0, 1.0, 0.3]))
    assert weight[hashing].sum() == pytest.approx(weight[~hashing].sum()) == pytest.approx(2.5)
    assert weight[4] / weight[0] == pytest.approx(0.3)


def test_our_own_kernels_weigh_more_than_the_table_and_the_libraries_less(own):
    listed = own._replace(project=np.array([dataset.ALLOW_LISTED[0]] * len(own.facts)))
    weight = train.weights(own.joined(listed).joined(table_of(own)))
    ours, theirs, table = np.split(weight, 3)
    assert set(ours[own.hashing]) == {train.OWN_HASHING_WEIGHT}
    assert set(ours[~own.hashing]) == {train.LOOK_ALIKE_WEIGHT}
    assert set(theirs) == {train.LISTED_WEIGHT}
    assert set(table) == {1.0}


def test_dead_float_code_changes_nothing_else(own):
    more = train.with_dead_float(own.table, 2.0)
    assert (more[:, COLUMN["FFMA"]] - own.table[:, COLUMN["FFMA"]] == 2 * own.table[:, 0]).all()
    assert (more[:, COLUMN["LOP3"]] == own.table[:, COLUMN["LOP3"]]).all()
    assert np.allclose(more[:, 0], 3 * own.table[:, 0])
    assert (train.thinned(own.table, 0)[:, 0] <= own.table[:, 0]).all()


def table_of(own: dataset.Kernels) -> dataset.Kernels:
    return own._replace(project=np.array([f"p{i % 3}" for i in range(len(own.facts))]), group=own.module)


def test_figures_of_a_perfect_and_of_a_useless_ranker(own):
    table = table_of(own)
    perfect = evaluation.judged(table, table.hashing.astype(float))
    assert evaluation.auc(perfect) == 1.0
    useless = evaluation.judged(table, np.zeros(len(table.facts)))
    assert evaluation.auc(useless) == pytest.approx(0.5)
    accused = evaluation.accuse(perfect, constants=False, grey=False, crossed=False)
    assert evaluation.recall(perfect, accused, perfect.module) == 1.0
    assert not accused[~perfect.hashing].any()


def test_structures_are_told_with_their_ratio(own):
    told = {one["name"]: one for one in evaluation.structures_found(own)}
    assert told["cryptonight"]["own_hashing"] == 1
    assert told["cryptonight"]["own_benign"] == told["join"]["own_benign"] == 0
    assert told["cryptonight"]["low"] < told["cryptonight"]["nats"] < told["cryptonight"]["high"]


def test_own_modules_are_judged_as_a_scan_would(own):
    counts, owners = own.parts()
    scores = {"whole": np.full(len(own.facts), -5.0), "parts": np.full(len(owners), -5.0)}
    scores |= {f"{form}float_{share}": scores["whole" if not form else "parts"]
               for form in ("", "parts_") for share in evaluation.DEAD_FLOAT_SHARES}
    line = Calibration(1.0, 0.0, 0.5)
    found = evaluation.own_modules(own, scores, owners, {"whole": line, "part": line})
    families = {one["family"]: one for one in found["families"]}
    assert families["sha2"]["masked"] == 0
    assert families["sha2"]["found"] == 1  # by its constants
    assert families["cryptonight"]["masked"] == families["cryptonight"]["structures"] == 1
    assert found["false_positives"]["found"] == []
    scores["parts"] = np.where(own.hashing[owners], 9.0, -5.0)
    found = evaluation.own_modules(own, scores, owners, {"whole": line, "part": line})
    assert found["recall"]["parts"]["value"] == 1.0
    assert found["recall"]["whole"]["value"] == 0.0
    assert len(counts)


def test_calibration_is_a_log_likelihood_ratio(own):
    table = table_of(own)
    dice = np.random.default_rng(1)
    score = dice.normal(np.where(table.hashing, 1.0, -1.0), 1.0)
    line = train.calibrate(table, score, 0.0)
    assert line.slope > 0
    assert math.isfinite(line.nats(0.0))


def test_a_forest_of_few_kernels_is_sound(own):
    pytest.importorskip("lightgbm")
    forest = train.fit(own, np.arange(len(own.facts)), seeds=(0,))
    forest.check(len(opcodes.FEATURES))
