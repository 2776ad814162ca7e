"""The card of the kernel classifier's model: what it was made of, what it finds, what it does not show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def card(result: dict[str, Any]) -> str:
    """Return the model card."""
    figures, own = result["figures"], result["own"]

    def interval(one: Mapping[str, float]) -> str:
        return f"{one['low']:.4f} to {one['high']:.4f}" if "low" in one else ""

    def rows(some: Sequence[Mapping[str, Any]], *columns: str) -> str:
        return "\n".join(f"| {' | '.join(str(one[name]) for name in columns)} |" for one in some)

    lines = "\n".join(f"| {text} | {figures[name]['value']:.4f} | {interval(figures[name])} |" for text, name in _LINES)
    ways = "\n".join(f"| {text} | {own['recall'][way]['value']:.4f} | {interval(own['recall'][way])} | "
                     f"{len(own['false_positives'][way])} |" for text, way in _WAYS_OF_OWN)
    sources = sorted({name.split(".")[0] for name in own["false_positives"]["found"]})
    return _CARD.format(
        lines=lines, trained=result["trained"], allowed=", ".join(result["allow_listed"]),
        rows=rows(result["projects"], "project", "kernels", "modules", "kernels_masked", "modules_masked",
                  "kernels_found", "modules_found"),
        families=rows(own["families"], "family", "modules", "whole", "parts", "structures", "masked", "found",
                      "masked_float_2.0"),
        structures=rows(result["structures"], "name", "hashing", "benign", "own_hashing", "own_benign", "nats", "low",
                        "high"),
        ways=ways, own_modules=own["modules"], own_hashing=own["hashing_modules"], own_benign=own["benign_kernels"],
        labels=", ".join(f"{name} {count}" for name, count in own["benign_labels"].items()),
        sources=", ".join(sources) or "none", vendor=f"{result['allow_listed_above_threshold']:.2%}",
        **result["kernels"], hashing_groups=result["groups"]["hashing"], benign_groups=result["groups"]["benign"],
        modules=result["modules"], missed="\n".join(f"- {name}" for name in result["modules_missed"]),
        positives=", ".join(f"{name} {count}" for name, count in result["false_positives"].items()) or "none",
        masked=figures["masked_module_recall"]["value"], half=figures["masked_module_recall_float_0.5"]["value"],
        double=figures["masked_module_recall_float_2.0"]["value"], plain=figures["module_recall"]["value"],
        own_half=own["recall"]["masked_float_0.5"]["value"],
        own_double=own["recall"]["masked_float_2.0"]["value"])


_WAYS_OF_OWN = (
    ("whole kernels", "whole"), ("best window or loop", "parts"), ("structures", "structures"),
    ("verdict, constants masked", "masked"), ("verdict, constants included", "found"),
    ("verdict, masked, float code of 0.5 x in every window and loop", "masked_float_0.5"),
    ("verdict, masked, float code of 2 x in every window and loop", "masked_float_2.0"),
)

_LINES = (
    ("AUC of the whole-kernel ranker, mix alone", "auc"),
    ("module recall, constants included, at kernel FPR <= 1e-3", "module_recall"),
    ("kernel recall, the same", "kernel_recall"),
    ("FPR, the same", "fpr"),
    ("log-likelihood ratio of an accusation, nats, the same", "nats"),
    ("module recall, constants masked", "masked_module_recall"),
    ("kernel recall, constants masked", "masked_kernel_recall"),
    ("log-likelihood ratio of an accusation, nats, constants masked", "masked_nats"),
    ("module recall, constants masked, no grey names", "no_grey_masked_module_recall"),
    ("module recall, constants included, no structures", "module_recall_without_structures"),
    ("module recall, constants masked, no structures", "masked_module_recall_without_structures"),
    ("module recall, thresholds crossed, constants included", "crossed_module_recall"),
    ("FPR that came out, the same", "crossed_fpr"),
    ("module recall, thresholds crossed, constants masked", "crossed_masked_module_recall"),
    ("FPR that came out, the same", "crossed_masked_fpr"),
    ("module recall, constants included, AES tables taken for a hash, not a cipher", "module_recall_aes_as_hash"),
    ("module recall, masked, dead float code of 0.5 x the kernel", "masked_module_recall_float_0.5"),
    ("module recall, masked, dead float code of 2 x the kernel", "masked_module_recall_float_2.0"),
    ("AUC on kernels thinned to 192 instructions", "window_sized_auc"),
    ("module recall of the same, constants masked", "window_sized_masked_module_recall"),
)

_CARD = """# code_forest: what GPU kernels are, by opcode counts

`code_forest.npz` holds gradient-boosted trees as plain arrays, and two lines from score to nats with the weight from
which on the mix accuses: for whole kernels, and for windows and loops. `gpuguard.code.classify` reads it. Made
{trained} by

    make fixtures-matrix
    python -m gpuguard.code.train --data kernels.csv.gz --own build/matrix --out models/

with fixed seeds (extra `train`: LightGBM; nvcc 13.0 for the matrix); `make bench-code-ranker` measures it again.

## Data and split
Numbers only (opcode histograms, derived counts, constants found), no code: {hashing} hashing kernels of
{hashing_groups} groups ({modules} modules) and {benign} benign ones of {benign_groups} groups, each of 64 instructions
or more. A group is a project with its forks. Nine folds, whole groups left out, one hashing group in each. Labels are
per project: a miner's scan, memset and result checks count as hashing. Allow-listed, trained on at less weight but not
scored on: {allowed}.

Trained on besides: {own_modules} modules of our own, {own_hashing} of which hash, with {own_benign} benign kernels that
were written to be mistaken (tests/fixtures/cuda). A family of ours is in one fold; it may have the algorithm, never the
code, of a project in another.

## Figures on the table
Out of fold; intervals are 95 % bootstraps over groups. "Crossed": the threshold of each fold is read off the benign
scores of the other folds only. Elsewhere it is read off the pooled benign scores, which is optimistic.

| figure | value | 95 % |
| --- | --- | --- |
{lines}

False positives, constants included: {positives}.

Were the allow-listed libraries not listed, {vendor} of their kernels would lie above the threshold, each judged by a
forest that had not seen its library.

| project | kernels | modules | kernels, masked | modules, masked | kernels, constants | modules, constants |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Modules missed with constants included:

{missed}

## Figures on our own modules
Source x architecture x unrolling x flags; each family is judged by a forest that was trained without it. Thresholds are
those of the table. Intervals are bootstraps over families.

| what sees it | module recall | 95 % | benign modules accused |
| --- | --- | --- | --- |
{ways}

| family | modules | whole | parts | structures | masked | constants | masked, 2 x float |
| --- | --- | --- | --- | --- | --- | --- | --- |
{families}

Labels of the {own_benign} benign kernels, their family unseen: {labels}.

Accused are kernels of: {sources}.

They are the hardest look-alikes that we could write, so this is no rate of ordinary code: it says that integer code of
a kind that was not trained on is not safe from the mix alone, and why the mix weighs little and confirms nothing. The
shipped forest was trained on them.

## Structures
Kernels that bear each signature, of the table (allow-listed libraries too) and of our own, and the log-likelihood ratio
in nats of both together, half a kernel added to each count. The bounds were set after a look at this data.

| signature | hashing | benign | own hashing | own benign | nats | 95 % low | high |
| --- | --- | --- | --- | --- | --- | --- | --- |
{structures}

## Evasion
| what the miner does | what it costs him | module recall |
| --- | --- | --- |
| renames, strips, throttles, launches otherwise | nothing | {plain:.4f}, as before |
| masks or uploads his constants | next to nothing | {masked:.4f} |
| the same, and dead float code of 0.5 x, or 2 x | code size | {half:.4f}, {double:.4f} |
| float code of 0.5 x, 2 x inside every loop (own) | 33 %, 67 % of issue slots | {own_half:.4f}, {own_double:.4f} |
| dead integer code of a look-alike | code size | not measured; parts are what stands against it |
| words and shape of a grey class | rounds that are not the hash's | grey, not accused; not measured |

## What it does not show
- Few groups: one family (ccminer) has two thirds of the modules, so the intervals are wide, and a change of seed moves
  module recall by two or three modules.
- Weights, features, constraints and form were chosen among some forty on figures like these (larger and smaller trees,
  random forests, other weights of groups, features of length, shares without float work, benign parts as negatives):
  most came to AUC 0.984 to 0.990 and masked module recall 0.86 to 0.94, so the choice is worth one or two points of
  optimism.
- The grey classes that shape alone names (bit-wise CRC, linear generators, generators that keep a state, table
  ciphers, unpacking) were bounded after looking at this data; the row "no grey names" is without any of them. `crc32`,
  `mt19937` and `chacha` words occur nowhere in the table: those three rules are measured on our own modules only.
- Random generators are `grey:rng` by two shapes. *Linear*: words looked up or stored one by one and added by xor in
  pairs, with hardly a carry, product, rotate or choice (Sobol, jumps ahead, MT19937). *Keeps a state*: five words or
  more are read and six to sixteen written back by each thread for itself, and hardly an xor (XORWOW, MRG32k3a). Their
  form was chosen by how curand's kernels differ from the table's; their bounds follow the algorithms, but two were
  loosened after looking at curand, so it is no clean hold-out. curand is in
  neither the table nor the training. Of its 1,603 judged kernels 12 stay accused (263 without these shapes, by
  an earlier forest), weighing 0.5 to 1.5 nats.
- The correction for the best of many parts is an upper bound, not a fit; parts of the table's kernels are thinned
  counts, real ones are our own only.
- What adds, turns and xors and does little else is between two chairs: look-alikes of light ciphers and generators pull
  it down. Three compilations of a CubeHash by another hand, without its constants, weigh 0.7 to 1.0 nats.
- Mining and cracking are told apart by tables of constants only; a mix that hashes is called mining.
- AES tables are a grey class: CryptoNight is told by its structure or by its side kernels, bulk AES is `grey:cipher`.
- Autolykos gathers and RandomX' interpreter have no signature: as kernels they are long-number sums and an interpreter.
  Our own are found by mix; what is found of real ones is mostly the side kernels.
"""
