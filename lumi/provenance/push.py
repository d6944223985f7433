"""`lumi push`: a model or an adapter -> a repository on the hub, in one commit, with its card."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.config import UserError, read_json
from lumi.formats.adapter_format import WEIGHTS, is_adapter, named_base
from lumi.formats.fingerprint import is_fingerprint_of
from lumi.formats.hf_format import open_tensors, read_shape
from lumi.formats.hub import download
from lumi.formats.peft_config import BASE, CONFIG, REVISION
from lumi.host.hub_cache import HubModel, origin_of, parse_name
from lumi.host.provenance import PROVENANCE_FILE
from lumi.provenance.chain import Link, made_by, verify
from lumi.provenance.model_card import Base, CardFacts, model_card, recorded_base
from lumi.provenance.pushed_files import CARD, PICTURE, Upload, choose_files
from lumi.provenance.repository import Repository
from lumi.provenance.run_facts import RunFacts, find_evaluations, find_runs
from lumi.provenance.tree import line, shown
from lumi.tokenizer.files import GENERATION_FILE
from lumi.tokenizer.loading import has_tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """What the command line says beside the model and the repository.

    Attributes:
        dry_run: show everything, ask and send nothing.
        private: of a new repository.
        branch: None: the main one.
        license: as the hub spells it, such as "apache-2.0".
        base_model: what the base is called on the hub, where it came from a folder here.
        search: where to look for what has moved, as `lumi verify` does.
        evaluations: what does not lie near the model.
        replace_card: also a card that somebody else has written.
    """

    dry_run: bool = False
    private: bool = False
    branch: str | None = None
    license: str | None = None
    base_model: str | None = None
    search: Sequence[Path] = ()
    evaluations: Sequence[Path] = ()
    replace_card: bool = False


def push(path: Path, repo: str, options: PushOptions) -> None:
    """Send a run's `final/`, or any folder of a model or an adapter.

    Raises:
        UserError: there is no model, an option does not fit it, or the hub refuses; nothing was sent then,
            unless the message says so.
    """
    target, folder = _target(repo, options), made_by(path)
    if not folder.is_dir():
        raise UserError("RUN", "must be a run or a model folder here", got=path, remedy="check the path")
    files = choose_files(folder)
    model = _trace(folder, options.search)
    runs = find_runs(model)
    for run in runs:
        print(f"trained by the run: {shown(run.folder)}")
    evaluations = find_evaluations(model, options.evaluations)
    for place, _ in evaluations:
        print(f"evaluation of these weights: {shown(place)}")
    base = _base(folder, runs[0] if runs else None, options)
    picture = _picture(runs[0]) if runs else []
    facts = CardFacts(
        target=target,
        shape=None if is_adapter(folder) else read_shape(folder),
        tokenizer=load_tokenizer(folder) if has_tokenizer(folder) else None,
        is_adapter=is_adapter(folder),
        fingerprint=model.identity,
        base=base,
        is_recorded=model.verdict == "ok",
        runs=runs,
        picture=bool(picture),
        generation_config=(folder / GENERATION_FILE).is_file(),
        evaluations=[results for _, results in evaluations],
        license=options.license,
    )
    uploads = [_on_the_hub(upload, base) for upload in files.uploads] + picture
    own_card = folder / CARD if (folder / CARD).is_file() and not options.replace_card else None
    card = own_card.read_text(encoding="utf-8") if own_card else model_card(facts)
    if own_card:
        print(f"{own_card}: is the card; --replace-card has another one written")
    _show(target, [*uploads, Upload(CARD, card.encode())], files.left_out)
    if options.dry_run:
        print(f"\n{card}\ndry run: the hub was asked nothing, and nothing was sent")
        return
    repository = Repository(target, private=options.private)
    print(repository.send(uploads, card, replace_card=options.replace_card or own_card is not None))


def _trace(folder: Path, search: Sequence[Path]) -> Link:
    """The model and what it was made from. Raises UserError if the model itself is not as it was written."""
    model = verify(folder, search, all_bytes=False)
    if model.is_fault:
        remedy = f"restore it; if you have changed it yourself, remove its {PROVENANCE_FILE}"
        raise UserError(f"{folder}:", "must be as it was written", got=line(model), remedy=remedy)
    for link in model.all():
        if link.is_fault:
            print(f"not in the card: {line(link)}")
    return model


def _target(repo: str, options: PushOptions) -> HubModel:
    """Where to. Raises UserError for a name or an option that cannot be."""
    target = parse_name(repo)
    if target is None or target.revision is not None:
        remedy = "pass a branch by --branch" if target else "letters, digits, -, _ and . make a name"
        raise UserError("REPO", "must be OWNER/NAME", got=repr(repo), remedy=remedy)
    if options.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", options.license):
        expectation = "must be spelt as the hub does, such as apache-2.0 or mit"
        raise UserError("--license", expectation, got=repr(options.license))
    return HubModel(target.repo, options.branch)


def _base(folder: Path, run: RunFacts | None, options: PushOptions) -> Base | None:
    """What training began with, with its place on the hub.

    Raises:
        UserError: the base of an adapter is not on the hub as far as is known, or another model is.
    """
    model, fingerprint = None, None
    if is_adapter(folder):
        named = named_base(folder)
        model = None if named is None or Path(named).exists() else parse_name(named)
        with open_tensors(folder / WEIGHTS) as opened:
            fingerprint = (opened.metadata() or {}).get("base_fingerprint")
        if model is None and options.base_model is None:
            push_it = "push it (`lumi push BASE OWNER/NAME`) and pass --base-model OWNER/NAME"
            expectation, remedy = (
                "must be on the hub for whoever loads it",
                f"{push_it}, or `lumi merge` both",
            )
            raise UserError(f"{folder}: the base", expectation, got=named or "none", remedy=remedy)
    elif run is not None and (recorded := recorded_base(run)) is not None:
        model, fingerprint = recorded.model, recorded.fingerprint
    elif run is not None and run.from_random and options.base_model is not None:
        got = "a run that began with random weights"
        raise UserError("--base-model", "must come with a fine-tuned model", got=got, remedy="leave it out")
    elif options.base_model is None:
        return None
    if options.base_model is not None:
        model = _given_base(options, fingerprint)
    return Base(model=model, fingerprint=fingerprint)


def _given_base(options: PushOptions, fingerprint: str | None) -> HubModel:
    """The model of `--base-model` at its commit. Raises UserError if its weights are not the base's."""
    model = parse_name(str(options.base_model))
    if model is None:
        raise UserError("--base-model", "must be OWNER/NAME on the hub", got=repr(options.base_model))
    if options.dry_run:
        print(f"{model}: whether it is the base is checked when it is sent")
        return model
    folder = download(model)
    if fingerprint is None:
        print(f"{model}: whether it is the base cannot be checked: its fingerprint is not recorded")
    elif not is_fingerprint_of(fingerprint, folder):
        expectation = f"must be the model that training began with, of fingerprint {fingerprint}"
        raise UserError("--base-model", expectation, got=f"other weights in {model}")
    return origin_of(folder) or model


def _picture(run: RunFacts) -> list[Upload]:
    path = run.folder / PICTURE
    return [Upload(PICTURE, path)] if path.is_file() and path.stat().st_size else []


def _on_the_hub(upload: Upload, base: Base | None) -> Upload:
    """The file; an adapter's config names its base on the hub, and no folder here."""
    if upload.name != CONFIG or base is None or base.model is None:
        return upload
    assert isinstance(upload.content, Path)
    config: dict[str, Any] = read_json(upload.content)
    named = {BASE: base.model.repo, REVISION: base.model.revision}
    if all(config.get(key) == value for key, value in named.items()):
        return upload
    return Upload(upload.name, (json.dumps(config | named, indent=2) + "\n").encode())


def _show(target: HubModel, uploads: Sequence[Upload], left_out: Sequence[str]) -> None:
    print(f"to {target.repo}" + (f", branch {target.revision}" if target.revision else ""))
    for upload in uploads:
        print(f"  {upload.size:>14,} bytes  {upload.name}")
    print(f"  {sum(upload.size for upload in uploads):>14,} bytes in {len(uploads)} files")
    for name in left_out:
        print(f"left out: {name}")
