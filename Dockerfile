# syntax=docker/dockerfile:1
# Two images from one file:
#     docker build --target build   -t ldm-deploy:build .    compiles bundles (PyTorch, CPU)
#     docker build --target runtime -t ldm-deploy .          runs and serves bundles, without PyTorch (the default target)
#     docker run --rm -v "$PWD":/work -u "$(id -u):$(id -g)" ldm-deploy generate my-bundle "a red apple" -o apple.png
#     docker run --rm -v "$PWD":/work -v ldm-state:/state -p 127.0.0.1:8000:8000 ldm-deploy \
#         serve my-bundle --host 0.0.0.0 --state /state --api-key-file keys.txt
# The runtime image is for the CPU; --build-arg EXTRAS=serve,gpu makes it one for NVIDIA GPUs, EXTRAS=serve,ray one whose
# `serve --ray` joins a Ray cluster. `deploy export-kubernetes` writes what such images run in.

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1
# A virtual environment is one folder: it is copied between stages whole, without pip's own leftovers.
RUN python -m venv /opt/ldm-deploy
ENV PATH="/opt/ldm-deploy/bin:$PATH"

# The wheel, made once for both images.
FROM base AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS runtime-environment
COPY --from=wheel /wheels /wheels
COPY constraints.txt /
ARG EXTRAS=serve
# onnxruntime and onnxruntime-gpu are two distributions of one module: the one for GPUs must be the only one, and brings
# CUDA and cuDNN as wheels.
RUN wheel="$(echo /wheels/*.whl)" \
    && pip install --constraint /constraints.txt "${wheel}[${EXTRAS}]" \
    && case ",${EXTRAS}," in *,gpu,*) \
        pip uninstall --yes onnxruntime onnxruntime-gpu \
        && pip install --constraint /constraints.txt "onnxruntime-gpu[cuda,cudnn]" ;; esac \
    && pip uninstall --yes setuptools pip

FROM base AS build
COPY --from=wheel /wheels /wheels
COPY constraints.txt /
# PyTorch's own index has the CPU build; PyPI's build for Linux brings gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN wheel="$(echo /wheels/*.whl)" \
    && pip install --extra-index-url "$TORCH_INDEX" --constraint /constraints.txt "${wheel}[build,openvino,prune,tensorrt-rtx]" \
    && useradd --create-home --uid 1000 deploy \
    && install -d -o deploy -g deploy /work
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["ldm-deploy"]
CMD ["--help"]

FROM python:3.11-slim AS runtime
COPY --from=runtime-environment /opt/ldm-deploy /opt/ldm-deploy
ENV PATH="/opt/ldm-deploy/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1
# A login shell, in which KubeRay may start Ray, forgets PATH: the commands are linked to where it looks.
RUN useradd --create-home --uid 1000 deploy \
    && install -d -o deploy -g deploy /work /state \
    && for name in ldm-deploy ray serve; do \
        if [ -e "/opt/ldm-deploy/bin/$name" ]; then ln -s "/opt/ldm-deploy/bin/$name" /usr/local/bin/; fi; done
USER 1000:1000
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["ldm-deploy"]
CMD ["--help"]
