# CPUs alone:  docker build -t referral .
# With CUDA:   docker build -t referral-cuda --build-arg TORCH=cuda .
#              docker run --rm --gpus all -v $PWD/runs:/runs referral-cuda doctor
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG TORCH=cpu
ARG EXTRAS=train,onnx
# libgomp: OpenMP of torch and scikit-learn.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
# torch for CUDA is the one on PyPI; the wheel of torch for CPUs alone is on an index of its own.
RUN case "$TORCH" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "TORCH=$TORCH: cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[$EXTRAS]"
RUN useradd --create-home referral
USER referral
WORKDIR /home/referral
ENV OMP_NUM_THREADS=1
ENTRYPOINT ["referral"]
CMD ["--help"]
