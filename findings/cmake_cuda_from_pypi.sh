#!/usr/bin/env bash
# CMake 4.4.4 cannot use CUDA 13.0 as PyPI has it by naming its nvcc, which compiles when it is called by hand.
#
# Two things stand between them, and each has a cure that is tried here too:
# 1. enable_language(CUDA) fails in the link of its own test program: nvcc.profile names lib64, the packages have lib.
#    Cure: CMAKE_CUDA_FLAGS=-L.../nvidia/cu13/lib.
# 2. find_package(CUDAToolkit) fails, "missing: CUDA_CUDART", also for those who want the static runtime only: it looks
#    for libcudart.so, and nvidia-cuda-runtime has libcudart.so.13 without the short name.
#    Cure: CUDA_CUDART=.../nvidia/cu13/lib/libcudart.so.13.
#
# Seen on Linux x86-64 with g++ 12.2:
#   1: /usr/bin/ld: cannot find -lcudart_static: No such file or directory
#   2: Could NOT find CUDAToolkit (missing: CUDA_CUDART) (found version "13.0.88")
#   3: with both cures it configures
# Exits 0 while it is so. Downloads about 135 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check cmake==4.4.4 ninja==1.13.2 nvidia-cuda-nvcc==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
cuda=$(echo "$folder"/venv/lib/python3*/site-packages/nvidia/cu13)

mkdir "$folder/project"
cat > "$folder/project/CMakeLists.txt" <<'PROJECT'
cmake_minimum_required(VERSION 3.28)
project(project LANGUAGES CXX CUDA)
find_package(CUDAToolkit REQUIRED)
PROJECT
configure() {
  rm -rf "$folder/build"
  "$folder/venv/bin/cmake" -S "$folder/project" -B "$folder/build" -G Ninja \
    -DCMAKE_MAKE_PROGRAM="$folder/venv/bin/ninja" -DCMAKE_CUDA_ARCHITECTURES=90 \
    -DCMAKE_CUDA_COMPILER="$cuda/bin/nvcc" "$@" > "$folder/output" 2>&1
}
# Says a line of the last output, or ends with all of it if the line is not there.
say() {
  grep -m 1 -h -o -r "$2" "$folder/output" "$folder/build/CMakeFiles/CMakeConfigureLog.yaml" | sed "s/^/$1: /" || {
    echo "$1: not seen any more: $2"
    cat "$folder/output"
    exit 1
  }
}

if configure; then echo "1: it configures without a cure"; exit 1; fi
say 1 '.*cannot find -lcudart_static.*'
if configure -DCMAKE_CUDA_FLAGS="-L$cuda/lib"; then echo "2: it configures with the first cure alone"; exit 1; fi
say 2 'Could NOT find CUDAToolkit (missing: CUDA_CUDART).*'
configure -DCMAKE_CUDA_FLAGS="-L$cuda/lib" -DCUDA_CUDART="$cuda/lib/libcudart.so.13" || { cat "$folder/output"; exit 1; }
echo "3: with both cures it configures"
