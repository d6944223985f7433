# Lumi with all that training and serving need, in the versions of constraints.txt:
#
#   docker build --tag lumi .
#   docker build --tag lumi-cuda --build-arg TORCH=cuda .
#   docker run --rm --volume "$PWD/runs:/runs" lumi demo --output-dir demo
#   docker run --rm --gpus all --volume "$PWD/runs:/runs" lumi-cuda doctor
#
# Nobody has built this file yet. A test holds its paths and versions against the repository.
FROM python:3.11-slim-bookworm AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY lumi lumi
COPY kernels kernels
COPY configs configs
COPY csrc csrc
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# torch's build for CPUs is smaller than PyPI's, which brings CUDA's libraries. Only on a GPU is a compiler needed:
# there Triton compiles a launcher in C for each kernel.
FROM python:3.11-slim-bookworm
ARG TORCH=cpu
COPY constraints.txt /tmp/
COPY --from=wheel /wheels /tmp/wheels
RUN case "$TORCH" in \
        cpu) pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
                "$(grep ^torch== /tmp/constraints.txt)" ;; \
        cuda) apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
                && rm -rf /var/lib/apt/lists/* ;; \
        *) echo "TORCH must be cpu or cuda, got $TORCH" && exit 1 ;; \
    esac \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/wheels/*.whl)[serve,gguf]" \
    && rm -r /tmp/wheels /tmp/constraints.txt
WORKDIR /runs
ENTRYPOINT ["lumi"]
CMD ["doctor"]
