#!/bin/sh
# Regenerate the gRPC stubs. grpcio-tools 1.63.2 forces an old protobuf, so it lives in a virtual environment of its
# own; what it generates runs on every protobuf from 5.26 on, which newer generators' output does not.
set -eu

venv=.venv-stubs
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet 'grpcio-tools==1.63.2' 'mypy-protobuf==3.6.0' 'setuptools<81'
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
PATH=$PWD/$venv/bin:$PATH "$venv/bin/python" -m grpc_tools.protoc \
    --proto_path=proto --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    gpuguard/v1/gpuguard.proto
# The package is gpuguard.v1 on the wire, gpuguard.api.v1 in Python.
sed -i 's/^from gpuguard\.v1 import/from gpuguard.api.v1 import/' "$out"/gpuguard/v1/*.py "$out"/gpuguard/v1/*.pyi
sed -i -e 's/^import gpuguard\.v1\.gpuguard_pb2$/import gpuguard.api.v1.gpuguard_pb2/' \
    -e 's/gpuguard\.v1\.gpuguard_pb2\./gpuguard.api.v1.gpuguard_pb2./g' "$out"/gpuguard/v1/gpuguard_pb2_grpc.pyi
mkdir -p gpuguard/api/v1
cp "$out"/gpuguard/v1/* gpuguard/api/v1/
