"""A repository of the Hugging Face hub, written to in one commit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

import lumi
from lumi.config import UserError
from lumi.formats.hub import LOGIN, reason_of
from lumi.host.hub_cache import HubModel
from lumi.provenance.model_card import is_ours
from lumi.provenance.pushed_files import CARD, Upload, is_stale


class Repository:
    """A repository and a branch, made where they are missing.

    Args:
        private: make a new repository private.

    Raises:
        UserError: no token, no network, or the hub refuses.
    """

    def __init__(self, target: HubModel, *, private: bool):
        self.target, self.branch = target, target.revision or "main"
        self.api = HfApi(library_name="lumi", library_version=lumi.__version__)
        if not get_token():
            got = "none"
            raise UserError(
                "the hub's token", "must be here, with leave to write", got=got, remedy=f"use {LOGIN}"
            )
        with _refusals(target.repo):
            self.api.create_repo(target.repo, private=private or None, exist_ok=True)
            if private and not self.api.model_info(target.repo).private:
                remedy = "make it private in its settings, or leave --private out"
                got = f"{target.repo}, which is public"
                raise UserError(
                    "--private", "must be of a private or a new repository", got=got, remedy=remedy
                )
            if target.revision is not None:
                self.api.create_branch(target.repo, branch=self.branch, exist_ok=True)

    def send(self, uploads: Sequence[Upload], card: str, *, replace_card: bool) -> str:
        """Commit the files and the card. Files of a model that was there before are deleted in it.

        A card that somebody has written or changed there stays, unless `replace_card`.

        Returns:
            A line with the address of the commit.

        Raises:
            UserError: the hub refuses, or somebody else commits meanwhile.
        """
        repo = self.target.repo
        with _refusals(repo):
            before = self.api.model_info(repo, revision=self.branch)
            there = [sibling.rfilename for sibling in before.siblings or ()]
            if CARD in there and not replace_card and not is_ours(self._read(CARD, before.sha)):
                print(f"{CARD}: that of {repo} stays; lumi push has not written it (--replace-card)")
            else:
                uploads = [*uploads, Upload(CARD, card.encode())]
            stale = [name for name in there if is_stale(name, list(uploads))]
            for name in stale:
                print(f"{name}: is deleted in {repo}; it belongs to the model that was there before")
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationDelete(path_in_repo=name) for name in stale
            ]
            operations += [CommitOperationAdd(upload.name, upload.content) for upload in uploads]
            done = self.api.create_commit(
                repo,
                operations,
                commit_message="Model by lumi push",
                revision=self.branch,
                parent_commit=before.sha,
            )
            return f"sent: {done.commit_url}"

    def _read(self, name: str, revision: str | None) -> str:
        path = self.api.hf_hub_download(self.target.repo, name, revision=revision)
        return Path(path).read_text(encoding="utf-8")


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """What the hub says against a push, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        remedies = {
            401: f"use another token: {LOGIN}",
            403: f"choose a name of your own, or use a token that may write there: {LOGIN}",
            404: "check the name",
            412: "somebody else committed meanwhile; push again",
        }
        remedy = remedies.get(error.response.status_code, "mend that, or try again")
        raise UserError(f"{repo}: the hub refuses: {reason_of(error)}", remedy=remedy) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        got = reason_of(error)
        raise UserError(
            "the hub", "must be reachable", got=got, remedy="connect; HF_HUB_OFFLINE must not be 1"
        ) from error
    except RuntimeError as error:  # a file did not arrive
        fault = " ".join(map(reason_of, filter(None, (error, error.__cause__))))
        raise UserError(f"{repo}: the hub refuses: {fault}", remedy="push again") from error
    except ValueError as error:  # the YAML of a card
        remedy = "mend the card, or --replace-card"
        raise UserError(f"{repo}: the hub refuses: {reason_of(error)}", remedy=remedy) from error
