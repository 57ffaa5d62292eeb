"""Building: a prepared model in integers, as its target says and as is fastest, with the bodies in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from onnxq import audit, firstlook
from onnxq import passes as p
from onnxq.bodies import bodies_with_layers, samples_of
from onnxq.collecting import Collecting
from onnxq.cones import cone_of_scaled, cones_of
from onnxq.data import Sample
from onnxq.errors import ModelError, OnnxqError, RecipeError, nearest
from onnxq.fastest import Built, fastest
from onnxq.feeds import Feed, size_of
from onnxq.graph import Variable
from onnxq.model import Model, Observed, State
from onnxq.passmanager import PassRecord
from onnxq.preparation import Prepared, comparable, counted, passes_of, prepare
from onnxq.recipe import Recipe
from onnxq.source import Source
from onnxq.stages import DYNAMIC, EQUALIZE, LOWER, OBSERVE, PLACE, REFINE, SELECT

LEAST_IN_LOOP = 1 << 18  # weights of a layer that is worth being integer in each step, where that is not measured


def equalize(prepared: Prepared, recipe: Recipe) -> tuple[Model, list[PassRecord]]:
    """The float model with its channels evened out, by a first look at a few samples."""
    start = prepared.model.fork()
    firstlook.look(prepared, start, recipe)
    start, records = prepared.manager.run_exact(start, passes_of(EQUALIZE, recipe), once=True)
    if any(r.rewrites for r in records):
        start.reference = start.graph.copy()
        known = dict(start.cones)  # a tensor that kept its name kept its values
        known |= {name: cone_of_scaled(start.cones[s.of], s.divisors) for name, s in start.scaled.items()}
        new = cones_of(start.graph.to_stored_proto(), known)
        start.evened_out = frozenset(new.keys() - start.cones.keys())
        start.cones = {**new, **start.cones}
        if start.calibration is not None:
            start.calibration.hold_for(start.cones)
    return start, records


def build(prepared: Prepared, recipe: Recipe) -> tuple[Model, list[PassRecord]]:
    """Build the model in integers, as is fastest where that is measured, and the bodies in it."""
    static = recipe.mode == "static"
    start, equalized = equalize(prepared, recipe) if static else (prepared.model, [])
    make = _build if static else _build_dynamic

    def variant(slower: frozenset[str], at_run_time: bool) -> Built:
        other = start.fork()
        other.slower, other.at_run_time = slower, at_run_time
        return make(prepared, other, recipe)

    def plain() -> Built:
        other = prepared.model.fork()
        other.calibration, other.slower = start.calibration, frozenset(n.name for n in other.graph.nodes)
        return make(prepared, other, recipe)

    best = make(prepared, start, recipe)
    if not any(node.bodies for node in start.graph.nodes):  # else it is not known yet what there is to match
        _check_overrides(recipe, start)
    probes = start.calibration.probes if start.calibration is not None else []
    if start.target.measured and recipe.objective == "latency" and not start.target.simulated and probes:
        try:
            best = fastest(best, variant, plain, comparable(prepared)[0], _typical(probes), threads=start.threads)
        except (ModelError, OSError, ValueError) as error:
            best = replace(best, note=f"Placements were not timed, so all is integer that can be: {error}.")
    model, prepared.unplaced, prepared.note, prepared.ranges = best.model, best.unplaced, best.note, dict(best.ranges)
    _quantize_bodies(prepared, recipe, model)
    _check_overrides(recipe, model)
    _stamp(model, recipe, prepared)
    prepared.model.calibration = start.calibration
    return model, prepared.records + equalized + best.records


def _check_overrides(recipe: Recipe, model: Model) -> None:
    """Raise RecipeError where an override matched nothing, in bodies neither; of a body itself nothing is known by that."""
    if recipe.mode == "dynamic" or model.scope:
        return
    for override in recipe.override:
        if not any(fnmatchcase(name, override.match) for name in model.overridable):
            hint = nearest(override.meant, sorted(model.overridable))[:300]
            raise RecipeError(f"{override.told} matches no quantized tensor; {hint}")


def _typical(feeds: Sequence[Feed]) -> Feed:
    """The feed of median size, for what is fastest may depend on the size."""
    return sorted(feeds, key=size_of)[len(feeds) // 2]


def _build(prepared: Prepared, start: Model, recipe: Recipe) -> Built:
    """A model in integers; again from placing without what the runtime did not fuse, or the outputs do not bear."""
    while True:
        model = start.fork()
        records = prepared.manager.run(model, passes_of(PLACE + OBSERVE + SELECT, recipe))
        start.calibration = model.calibration
        if model.sensitive != start.sensitive:
            start.sensitive, start.demanded = model.sensitive, model.demanded
            continue
        records += prepared.manager.run(model, passes_of(REFINE, recipe))
        ranges = {name: model.params[name] for name in _activations(model)}
        records += prepared.manager.run(model, passes_of(LOWER, recipe))
        integer = audit.run_in_integers(model.graph.to_stored_proto(), model)
        if model.planned <= integer or model.target.simulated:  # each round un-places at least one node more, so this comes
            break
        start.unplaced = start.unplaced | (model.planned - integer)
    audit.complete_ledger(model, integer)
    return Built(model, records, {model.scope + name: params for name, params in ranges.items()}, start.unplaced)


def _quantize_bodies(prepared: Prepared, recipe: Recipe, model: Model) -> None:
    """The bodies of If, Loop and Scan, each as a model of its own, in place of what they are in the model."""
    reference, calibration = model.reference, model.calibration
    assert reference is not None
    assert calibration is not None
    samples: Iterable[Sample] = counted(prepared, model) or [
        Sample(feed, None, f"kept feed {k}") for k, feed in enumerate(calibration.kept.values())
    ]
    how = Collecting(on_nonfinite=model.collecting.on_nonfinite, memory_limit=model.collecting.memory_limit)
    own = recipe.model_copy(update={"passes": {**recipe.passes, "raise-opset": False}})
    nodes = {n.name: n for n in model.graph.nodes}
    for body in bodies_with_layers(reference, 1 if model.target.measured else LEAST_IN_LOOP):
        if body.node.name in model.excluded or not all(name in model.graph.tensors() for name in body.captured):
            continue
        which = f"the {body.key} of {body.node.name}"
        dumps = prepared.dump_dir and prepared.dump_dir / re.sub(r"\W+", "_", f"{body.node.name}-{body.key}")
        try:
            inside = None if recipe.mode == "dynamic" else samples_of(body, reference, samples, model.threads)
            if inside is None and recipe.mode != "dynamic":
                continue  # nothing is known of what goes in
            part = prepare(
                Source(body.proto, None, None), inside, own, threads=model.threads, collecting=how,
                scope=f"{model.scope}{body.node.name}.{body.key}:", dump_dir=dumps, progress=model.progress,
            )  # fmt: skip
            done, records = build(part, own)
            model.overridable |= done.overridable
        except OnnxqError as error:  # it runs in its place all the same
            prepared.notes.append(f"{which[0].upper()}{which[1:]} stays in float: {error}.")
            continue
        if any(e.state is not State.FLOAT for e in done.ledger.values()):
            model.graph.set_body(nodes[body.node.name], body.key, done.graph.to_proto())
            model.ledger.update(done.ledger)
            prepared.ranges |= part.ranges
            prepared.notes += part.notes
            prepared.notes += [
                f"In {which}, pass {r.name} was rolled back: {r.rolled_back}." for r in records if r.rolled_back
            ]
            if model.samples is None and recipe.mode == "static":
                kept = len(calibration.kept)
                prepared.notes.append(f"In {which}, ranges are of the {kept} feeds that the calibration keeps.")
    model.graph.cleanup()
    prepared.manager.run(model, passes_of([p.InsertWeightOnly], recipe))  # of what a body has in float all the same


def _build_dynamic(prepared: Prepared, start: Model, recipe: Recipe) -> Built:
    """Weights in integers, activations quantized at every run; again without what the runtime did not fuse."""
    while True:
        model = start.fork()
        records = prepared.manager.run(model, passes_of(DYNAMIC, recipe))
        integer = audit.run_in_integers(model.graph.to_stored_proto(), model)
        if model.planned <= integer:
            break
        start.unplaced = start.unplaced | (model.planned - integer)
    audit.complete_ledger(model, integer)
    return Built(model, records, unplaced=start.unplaced)


def _activations(model: Model) -> list[str]:
    """The tensors with a range of their own."""
    tensors = model.graph.tensors()
    observed = [name for name, spec in model.specs.items() if isinstance(spec, Observed) and name in model.params]
    return [name for name in observed if isinstance(tensors.get(name), Variable)]


def _stamp(model: Model, recipe: Recipe, prepared: Prepared) -> None:
    """Provenance into the file's metadata; nothing in it depends on the time or the place."""
    from onnxq import __version__

    ledger: dict[str, dict[str, list[Any]]] = {}  # state, op type, then names: with their reason where they have one
    for name, e in model.ledger.items():
        line = name if e.reason is None else [name, e.reason.name.lower(), *([e.detail] if e.detail else [])]
        ledger.setdefault(e.state.value, {}).setdefault(e.op, []).append(line)
    model.graph.set_metadata("onnxq.version", __version__)
    model.graph.set_metadata("onnxq.recipe", recipe.model_dump_json(by_alias=True))
    model.graph.set_metadata("onnxq.source_sha256", prepared.source_hash)
    model.graph.set_metadata("onnxq.ledger", json.dumps(ledger, separators=(",", ":")))
