"""The training set of stage cvae: cubes with the flows that the frozen autoencoder reconstructed, written down once."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from common import training
from common.io import load_array, read_json, stream_npy, write_json
from common.loader import take_rows
from common.objects.cube_dataset import CubeDataset
from hf2vad import scoring


def reconstruct_flows(net, records, run, path) -> np.ndarray:
    """The frozen ML-MemAE-SC's answer for every training cube: float16 [N, 2·flows, S, S] memory map at `path`.

    Stage cvae would compute it anew in every epoch; the file beside it names the weights it comes from.
    """
    side = path.with_suffix(".json")
    key = {"weights": training.weights_hash(net.memAE), "cubes": sum(map(len, records))}
    if run.is_main and not (path.exists() and side.exists() and read_json(side, "reconstructions' entry") == key):
        frozen = scoring.Scorer(net.memAE, run).net
        data = CubeDataset(records, {"flow": slice(None)}, run, once=True)

        def parts():
            n = len(data)
            bar = tqdm(total=n, desc="reconstruct flows", unit="cube", mininterval=1 if sys.stderr.isatty() else 30)
            with bar:
                for rows, batch in data.batches(np.arange(n), 256):
                    flow = batch["flow"].float().flatten(0, 1).contiguous(memory_format=torch.channels_last)
                    with torch.inference_mode(), run.autocast():
                        recon = frozen(flow)["recon"].float().cpu().numpy()
                    yield recon.astype(np.float16).reshape(len(rows), -1, *recon.shape[2:])
                    bar.update(len(rows))

        stream_npy(path, parts())  # through a memory map, a full disk would end the process with a signal
        write_json(side, key)
    run.barrier()
    return load_array(path, "reconstructed flows", mmap=True)


class CubesWithFlows(CubeDataset):
    """Cubes with one more field, `recon`, from a file of the same order."""

    def __init__(self, records, recon, run):
        self.recon = recon
        super().__init__(records, scoring.FIELDS, run)

    def nbytes(self):
        return super().nbytes() + self.recon.nbytes

    def load_all(self):
        return {**super().load_all(), "recon": self.run.keep_on_device([self.recon], len(self))}

    def read(self, rows):
        if self.resident is not None:
            return super().read(rows)
        recon = take_rows([self.recon], [0], rows, self.recon.shape[1:], self.recon.dtype)
        return {**super().read(rows), "recon": self.run.pin(recon)}


def stage_data(stage: str, net, records, run, out) -> CubeDataset:
    """The cubes of a stage: memae trains on the last flow only, cvae also on the reconstructed flows."""
    if stage == "memae":
        return CubeDataset(records, {"flow": slice(-1, None)}, run)
    if stage == "finetune":
        return CubeDataset(records, scoring.FIELDS, run)
    return CubesWithFlows(records, reconstruct_flows(net, records, run, out / "reconstructed_flows.npy"), run)
