# CPUs alone:  docker build -t referral .
# With CUDA:   docker build -t referral-cuda --build-arg TORCH=cuda .
#              docker run --rm --init --gpus all --ipc=host referral-cuda doctor
# Another Python: --build-arg PYTHON=3.13.  Other extras: --build-arg EXTRAS=train,onnx,wandb.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG TORCH=cpu
ARG EXTRAS=train,onnx
# libgomp: OpenMP of torch and scikit-learn. Whichever version this Debian has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /source/constraints.txt /wheels/
# The releases of constraints.txt, as `make install` takes them.
# torch for CUDA is the one on PyPI; the wheel of torch for CPUs alone is on an index of its own.
RUN case "$TORCH" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "TORCH=$TORCH: cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[$EXTRAS]"
# With --user a container is whoever owns the mounted runs, and has no entry in /etc/passwd: what
# torch and matplotlib keep below HOME has to be writable for everybody, and USER says a name.
RUN useradd --create-home --uid 1000 referral && chmod 1777 /home/referral
USER 1000
WORKDIR /home/referral
ENV HOME=/home/referral USER=referral OMP_NUM_THREADS=1
RUN referral --version
ENTRYPOINT ["referral"]
CMD ["--help"]
