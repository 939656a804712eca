"""Run by ``verify.py`` in a process of its own: load a checkpoint and write its logits.

Imports torch and transformers only and makes ghost_dist unimportable, so that what it loads is what
a user without ghost_dist would load. Argument: a JSON file with ``search_path`` and ``jobs``, each
``folder``, ``tokens`` (.npy, int64), ``logits`` (.npy to write), ``dtype``, ``device``,
``trust_remote_code`` and ``num_threads``.
"""

import json
import sys


def main(request_file: str) -> None:
    """Do the jobs of the request."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    sys.path[:] = request["search_path"]
    sys.modules["ghost_dist"] = None  # type: ignore[assignment]

    import numpy as np
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for job in request["jobs"]:
        torch.set_num_threads(job["num_threads"])
        device = torch.device(job["device"])
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            job["folder"],
            dtype=getattr(torch, job["dtype"]),
            device_map=None if device.type == "cpu" else {"": device},
            trust_remote_code=job["trust_remote_code"],
            local_files_only=True,
            output_loading_info=True,
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise SystemExit(
                f"missing tensors {sorted(info['missing_keys'])}, "
                f"unexpected tensors {sorted(info['unexpected_keys'])}"
            )
        tokens = torch.from_numpy(np.load(job["tokens"]))
        with torch.inference_mode():
            rows = [model(row[None].to(device), use_cache=False).logits.float() for row in tokens]
        np.save(job["logits"], torch.cat(rows).cpu().numpy())


if __name__ == "__main__":
    main(sys.argv[1])
