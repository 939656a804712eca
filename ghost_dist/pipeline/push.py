"""The recovered checkpoint of a finished run, onto the Hugging Face Hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.config import Config
from ghost_dist.errors import ConfigError, GhostDistError, RunFolderError
from ghost_dist.export.model_card import CARD
from ghost_dist.pipeline.bench_serving import exported
from ghost_dist.report.record import RunRecord
from ghost_dist.run_folder import RunFolder, recover_command


@dataclass(frozen=True)
class Upload:
    repo_id: str  # owner/name
    folder: Path
    files: Mapping[str, int]  # name to bytes, all of the folder
    metadata: Mapping[str, Any]  # of the model card
    message: str  # of the commit
    notes: tuple[str, ...]  # what to look at before it is public


def prepare_upload(run: Path, repo_id: str) -> Upload:
    """Check a finished run's checkpoint and say what would be sent; nothing is."""
    from huggingface_hub import metadata_load
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name on the Hub (owner/name): {error}") from None
    record = RunRecord(run)
    folder = run / "checkpoint"
    again = f"Finish the run first: {recover_command(run)}"
    if record.result is None:
        raise RunFolderError(f"The run in {run} is not finished. {again}")
    if record.stale:
        raise RunFolderError(f"{folder} is of another state of the run. {record.out_of_date[0]}")
    open_checkpoint(folder)
    of_checkpoint = folder / "result.json"
    if not of_checkpoint.exists() or exported(of_checkpoint) != exported(run / "result.json"):
        raise RunFolderError(f"{folder} does not belong to {run / 'result.json'}. {again}")
    try:
        metadata = metadata_load(folder / CARD)
    except ValueError:  # no mapping
        metadata = None
    if metadata is None:
        raise RunFolderError(f"{folder / CARD} has no metadata at its beginning. {again}")
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    spans = ", ".join(f"[{start}, {stop})" for start, stop in record.spans)
    message = f"Layers {spans} removed and recovered ({record.result['operator']})"
    notes = _notes(RunFolder.stored_config(run), metadata)
    return Upload(repo_id, folder, files, metadata, message, notes)


def upload(what: Upload, *, private: bool, pull_request: bool, revision: str | None = None) -> str:
    """Make the repository if there is none and send the files; returns the commit's address.

    With the token of ``hf auth login`` or ``HF_TOKEN``, to ``HF_ENDPOINT``; called again it goes
    on.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="ghost_dist")
    # Its bases are OSError and what the HTTP library of this version of the client raises.
    failures: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__
    try:
        api.create_repo(what.repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=what.repo_id,
            folder_path=what.folder,
            commit_message=what.message,
            revision=revision,
            create_pr=pull_request,
        )
    except failures as error:
        response = getattr(error, "response", None)
        refused = response is not None and response.status_code in (401, 403)
        hint = (
            "Log in with a token that may write there: hf auth login, or HF_TOKEN."
            if refused
            else "The same command goes on with what is missing."
        )
        raise GhostDistError(
            f"{what.repo_id} at {api.endpoint} could not be written: {error}. {hint}"
        ) from error
    return str(commit.pr_url or commit.commit_url)


def _notes(config: Config, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if "license" not in metadata:
        notes.append(
            f"{CARD} names no licence, since the source's is not known: add one that the model's "
            "own allows."
        )
    if "base_model" not in metadata:
        notes.append(
            f"{CARD} names no base_model, since the source is a local folder: add its name on the "
            "Hub."
        )
    named = [config.calibration.source, *config.evaluation.corpora.values(), config.model.path]
    paths = [str(path) for path in named if Path(path).expanduser().is_absolute()]
    if paths:
        notes.append(f"config.yaml names paths of this machine: {', '.join(paths)}.")
    return tuple(notes)
