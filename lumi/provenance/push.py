"""`lumi push`: a model or an adapter -> a repository on the hub, in one commit, with its card."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lumi.config import UserError, read_json
from lumi.formats.adapter_format import WEIGHTS, is_adapter, named_base
from lumi.formats.checkpoint_folder import MODEL_PATH
from lumi.formats.fingerprint import is_fingerprint_of, weights_fingerprint
from lumi.formats.hf_format import open_tensors, read_shape
from lumi.formats.hub import HubModel, download, origin_of, parse_name
from lumi.formats.peft_config import BASE, CONFIG, REVISION
from lumi.host.storage import sha256_file
from lumi.provenance.model_card import Base, CardFacts, model_card
from lumi.provenance.pushed_files import CARD, PICTURE, Upload, choose_files
from lumi.provenance.repository import Repository
from lumi.provenance.run_facts import RunFacts, find_data, find_evaluations, read_run, run_of
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
        data_dirs, evaluations: what does not lie beside the run.
        replace_card: also a card that somebody else has written.
    """

    dry_run: bool = False
    private: bool = False
    branch: str | None = None
    license: str | None = None
    base_model: str | None = None
    data_dirs: Sequence[Path] = ()
    evaluations: Sequence[Path] = ()
    replace_card: bool = False


def push(path: Path, repo: str, options: PushOptions) -> None:
    """Send a run's `final/`, or any folder of a model or an adapter.

    Raises:
        UserError: there is no model, an option does not fit it, or the hub refuses; nothing was sent then,
            unless the message says so.
    """
    target = _target(repo, options)
    run_folder = run_of(path)
    folder = path if run_folder is None else run_folder / "final"
    if not folder.is_dir():
        raise UserError("RUN", "must be a run or a model folder here", got=path, remedy="check the path")
    files = choose_files(folder)
    run = None if run_folder is None else read_run(run_folder)
    if run is not None:
        data, taken = find_data(run, options.data_dirs)
        run = replace(run, data=data)
        for place in taken:
            print(f"data of the run: {place}")
    elif options.data_dirs:
        raise UserError(
            "--data-dirs", "must come with a run", got=f"{folder}, which is none", remedy="leave it out"
        )
    evaluations = find_evaluations(folder, options.evaluations)
    for place, _ in evaluations:
        print(f"evaluation of these weights: {place}")
    base = _base(folder, run, options)
    picture = [] if run is None else _picture(run)
    facts = CardFacts(
        target=target,
        shape=None if is_adapter(folder) else read_shape(folder),
        tokenizer=load_tokenizer(folder) if has_tokenizer(folder) else None,
        is_adapter=is_adapter(folder),
        fingerprint=sha256_file(folder / WEIGHTS) if is_adapter(folder) else weights_fingerprint(folder),
        base=base,
        run=run,
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
    named, fingerprint = None, None
    if is_adapter(folder):
        named = named_base(folder)
        with open_tensors(folder / WEIGHTS) as opened:
            fingerprint = (opened.metadata() or {}).get("base_fingerprint")
    elif run is not None and run.state is not None:
        named, fingerprint = run.state.get(MODEL_PATH), run.identity["start"]
        if named is None and options.base_model is not None:
            got = "a run that began with random weights"
            raise UserError(
                "--base-model", "must come with a fine-tuned model", got=got, remedy="leave it out"
            )
    if options.base_model is not None:
        return Base(model=_given_base(options, fingerprint), fingerprint=fingerprint)
    is_here = named is not None and Path(named).exists()
    model = parse_name(named) if named is not None and not is_here else None
    if is_adapter(folder) and model is None:
        got = named or "none"
        remedy = (
            "push it (`lumi push BASE OWNER/NAME`) and pass --base-model OWNER/NAME, or `lumi merge` both"
        )
        expectation = "must be on the hub for whoever loads the adapter"
        raise UserError(f"{folder}: the base", expectation, got=got, remedy=remedy)
    return None if named is None else Base(model=model, fingerprint=fingerprint)


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
