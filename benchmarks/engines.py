"""Other engines for a float model: onnxruntime and OpenVINO in float32 and their own int8, CTranslate2's int8 encoder.

    python benchmarks/engines.py PACKED --against FLOAT

times a packed model beside its float model in each of them that is installed (pip install bittern[bench]), in turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel

from bittern import attention
from bittern.deploy.bench import bench
from bittern.errors import BitternError


def onnxruntime_engines(
    model: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path
) -> dict[str, Callable[[], object]]:
    """The float model in onnxruntime, and quantized dynamically to int8 by its own tool; nothing if not installed.

    Files that are in the folder already are used again.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        return {}
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnxruntime.set_default_logger_severity(3)
    names = ("onnxruntime float32", "onnxruntime int8")
    feeds = {key: value.numpy() for key, value in batch.items()}
    engines: dict[str, Callable[[], object]] = {}
    for name in names:
        file = folder / f"{name}.onnx"
        if not file.exists():
            part = file.with_suffix(".part")
            with _silence():
                if name == names[0]:
                    export_float(model, batch, part)
                else:
                    graph = onnx.load(folder / f"{names[0]}.onnx")
                    del graph.graph.value_info[:]  # the tool infers shapes itself, and stumbles over the exporter's
                    quantize_dynamic(graph, part, weight_type=QuantType.QInt8)
            part.rename(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        engines[name] = partial(session.run, None, feeds)
    return engines


def openvino_engines(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    folder: Path,
    calibration: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Callable[[], object]]:
    """The float model in OpenVINO, and with static int8 for weights, linear inputs and both products of attention, by
    NNCF, calibrated on the batch or on others of its shape; nothing if not installed. Files that are in the folder
    already are used again.
    """
    if any(find_spec(name) is None for name in ("openvino", "nncf", "onnxscript")):
        return {}
    os.environ["NNCF_CI"] = "1"  # it sends no telemetry
    import nncf
    import openvino

    names, source = ("openvino float32", "openvino int8"), folder / "onnxruntime float32.onnx"
    feeds = {key: value.numpy() for key, value in batch.items()}
    samples = [{key: value.numpy() for key, value in some.items()} for some in calibration or [batch]]
    if not source.exists():
        with _silence():
            export_float(model, batch, source)
    core, engines = openvino.Core(), dict[str, Callable[[], object]]()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    for name in names:
        file = folder / f"{name}.xml"
        if not file.exists():
            graph = core.read_model(source)
            if name == names[1]:
                nncf.set_log_level(logging.ERROR)
                kind, preset = nncf.ModelType.TRANSFORMER, nncf.QuantizationPreset.MIXED
                with _silence():
                    graph = nncf.quantize(graph, nncf.Dataset(samples), model_type=kind, preset=preset)
            openvino.save_model(graph, file, compress_to_fp16=False)
        request = core.compile_model(file, "CPU", settings).create_infer_request()
        engines[name] = partial(request.infer, feeds, share_inputs=True)
    return engines


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter and the tool tell of much that is no fault."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Tensors(nn.Module):
    """A model that takes tensors by position and gives its first output, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=True)[0]  # type: ignore[no-any-return]


def export_float(model: PreTrainedModel, batch: Mapping[str, Tensor], file: Path) -> None:
    """A float model as an ONNX file for this batch, with explicit attention, which onnxruntime runs fastest."""
    was = [config._attn_implementation for config in attention.attention_configs(model)]
    model.set_attn_implementation("eager")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    try:
        torch.onnx.export(
            _Tensors(model, tuple(batch)).eval(),
            tuple(batch.values()),
            file,
            input_names=list(batch),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    finally:
        for config, name in zip(attention.attention_configs(model), was, strict=True):
            config._attn_implementation_internal = name


def ctranslate2_engine(
    model: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path
) -> dict[str, Callable[[], object]]:
    """The encoder of a float BERT in int8; nothing if CTranslate2 is not installed or the model is another.

    All samples of the batch must be as long as it is.
    """
    encoder = model.base_model
    if find_spec("ctranslate2") is None or not isinstance(encoder, BertModel) or encoder.pooler is None:
        return {}
    from ctranslate2 import Encoder, StorageView
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import BertLoader

    class InMemory(Converter):
        def _load(self) -> object:
            size = encoder.config.vocab_size
            names = SimpleNamespace(unk_token="0", get_vocab=lambda: {str(i): i for i in range(size)})
            return BertLoader()(encoder, names)

    # an attribute that configurations no longer have, and that the converter asks for
    encoder.config.position_embedding_type = "absolute"
    try:
        InMemory().convert(str(folder / "ctranslate2"), force=True)  # rounded to int8 when it is loaded
    finally:
        del encoder.config.position_embedding_type
    made = Encoder(str(folder / "ctranslate2"), compute_type="int8", intra_threads=torch.get_num_threads())
    ids = batch["input_ids"].to(torch.int32).numpy()
    lengths = batch["attention_mask"].sum(1, dtype=torch.int32).numpy()
    view = StorageView.from_array
    return {"ctranslate2 int8": partial(made.forward_batch, view(ids), view(lengths))}


def all_engines(model: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path) -> dict[str, Callable[[], object]]:
    """The float model in every engine that is installed."""
    made = (onnxruntime_engines, openvino_engines, ctranslate2_engine)
    return {name: call for engine in made for name, call in engine(model, batch, folder).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--against", type=Path, help="the float model; by default the one it was made from")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens of each text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of lines")
    options = vars(parser.parse_args())
    path, as_json = options.pop("packed"), options.pop("json")
    with tempfile.TemporaryDirectory() as folder:

        def engines(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
            return all_engines(model, batch, Path(folder))

        try:
            result = bench(path, engines=engines, **options)
        except BitternError as error:
            raise SystemExit(str(error)) from error
        for name, engine in result["engines"].items():
            files = [Path(folder) / f"{name}{kind}" for kind in (".onnx", ".xml", ".bin")]
            if total := sum(file.stat().st_size for file in files if file.exists()):
                engine["file"] = total
    if as_json:
        print(json.dumps(result))
        return
    for name, engine in result["engines"].items():
        size = "" if engine["file"] is None else f"{engine['file'] / 1e6:.2f} MB"
        print(f"{name:20} {engine['latency_ms']:8.2f} ms, time / ours {engine['times_ours']:5.2f} {size}")


if __name__ == "__main__":
    main()
