"""Models on the Hugging Face hub: `org/name` or `org/name@revision` -> a folder in the hub's cache.

That folder goes on as any other; `lumi.host.hub_cache` knows its name.
"""

from pathlib import Path

from lumi.config import UserError
from lumi.host.hub_cache import HubModel, parse_name

LOGIN = "`hf auth login`, or set HF_TOKEN"
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]
_OTHERS = ["*/*", "consolidated*"]  # folders of other formats, and Mistral's weights in its own format


def hub_model(path: str | Path) -> HubModel | None:
    """What a path from the user names on the hub; None: a place on this machine.

    What exists here is meant. `runs/my` is not looked for on the hub where there is a folder `runs`: a typing
    error would load a stranger's model. `runs/my@main` is.
    """
    model = parse_name(str(path))
    if model is None or Path(path).exists():
        return None
    return None if model.revision is None and Path(model.repo).parent.exists() else model


def local_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The path itself, or the folder of what it names on the hub, downloaded where that is necessary.

    Args:
        weights: False: only the tokenizer and what is said of the model are wanted.

    Raises:
        UserError: there is no such model, it may not be read, or it is neither in the cache nor reachable.
    """
    model = hub_model(path)
    return Path(path) if model is None else download(model, weights=weights)


def download(model: HubModel, *, weights: bool = True) -> Path:
    """The folder of a model on the hub; as `local_folder`."""
    from huggingface_hub import snapshot_download  # here: few commands need it, and it takes a while
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    remedy = f"check the name; for a private model: {LOGIN}"
    try:
        folder = snapshot_download(
            model.repo,
            revision=model.revision,
            allow_patterns=_SMALL_FILES + (_WEIGHTS if weights else []),
            ignore_patterns=_OTHERS,
        )
        return Path(folder)
    except GatedRepoError as error:
        fault = "is gated, and this login has no access"
        remedy = f"ask for it on the model's page, then {LOGIN}"
        raise _not_there(model, fault, remedy) from error
    except RevisionNotFoundError as error:
        fault = f"has no revision {model.revision}"
        raise _not_there(model, fault, "pass a branch, a tag or a commit of it") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _not_there(model, "knows no such model that this login may read", remedy) from error
    except LocalEntryNotFoundError as error:
        fault = "cannot be reached, and the cache holds no whole copy"
        raise _not_there(model, fault, "connect, or pass a folder; HF_HUB_OFFLINE must not be 1") from error
    except (HfHubHTTPError, HTTPError) as error:
        raise _not_there(model, f"answered: {reason_of(error)}", "try again") from error


def _not_there(model: HubModel, fault: str, remedy: str) -> UserError:
    expectation = "must be a folder or a model on the Hugging Face hub"
    return UserError(f"{model}:", expectation, got=f"no such folder, and the hub {fault}", remedy=remedy)


def reason_of(error: BaseException) -> str:
    """What the hub said, in one line and without the token."""
    from huggingface_hub import get_token

    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    response = getattr(error, "response", None)
    line = " ".join(([] if response is None else [str(response.status_code)]) + said.split())
    token = get_token()
    return (line.replace(token, "[token]") if token else line)[:300]


def as_before(path: str | Path, recorded: str | None) -> Path:
    """What a path names, at the commit that an earlier call recorded. A revision that is given holds."""
    model, before = hub_model(path), parse_name(recorded or "")
    if model is not None and before is not None and model == HubModel(before.repo, None):
        return Path(str(recorded))
    return Path(path)
