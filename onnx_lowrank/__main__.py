"""`python -m onnx_lowrank`."""

from onnx_lowrank.cli import main

main()
