"""How long a graph of many nodes takes, step by step: read, survey, rewrite every site, write.

    tools/graph_times.py                     # 20 001 nodes
    tools/graph_times.py --layers 13334      # twice as many: twice the time, unless a step is quadratic

The graph is a residual stream: each layer a MatMul of 4×4, a Tanh, and an Add that all later layers read.
Prints seconds of processor time; no limit is checked.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lowrank.files import read_model, write_model
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.rewrite import patch_of

NODES_A_LAYER = 3


def residual_model(layers: int) -> onnx.ModelProto:
    """A residual stream: what layer i adds to it reaches all later layers."""
    nodes, name = [], "x"
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]))
        nodes.append(helper.make_node("Add", [name, f"t{i}"], [f"s{i}"]))
        name = f"s{i}"
    weights = [numpy_helper.from_array(np.full((4, 4), 0.1, np.float32), f"w{i}") for i in range(layers)]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 4]) for n in ("x", name))
    graph = helper.make_graph(nodes, "stream", [x], [y], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6667, help="of three nodes each")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        path.write_bytes(residual_model(layers).SerializeToString())
        began = last = time.process_time()

        def done(step: str) -> None:
            nonlocal last
            now = time.process_time()
            print(f"{step:8} {now - last:6.2f} s", flush=True)
            last = now

        file = read_model(path)
        done("read")
        graph = Graph(file.model, file.folder)
        done("graph")
        sites = survey(graph).sites
        done("survey")
        for site in sites:
            factors = np.eye(4)[:, :2], np.eye(4)[:2]
            graph.apply(patch_of(site, SVD.build(site.geometry, *factors, site.bias_vector), "svd"))
        done("rewrite")
        write_model(graph.commit(), path.with_name("out.onnx"), folder=file.folder, external=False)
        done("write")
        print(f"{layers * NODES_A_LAYER} nodes, {len(sites)} sites: {last - began:.1f} s")


if __name__ == "__main__":
    main()
