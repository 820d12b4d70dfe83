# docker build -t nsa-transformer .
# docker run --gpus all nsa-transformer                      trains the base model on Python's own standard library
# docker run --gpus all -v "$PWD/runs:/workspace/runs" nsa-transformer python training/trainer.py model=tiny
ARG BASE_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

# The compiler and headers are for Triton and torch.compile, which build small C modules at run time.
# Package versions are those of the base image, which is the caller's to choose.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("the base image has Python %d.%d; choose one with 3.11 or 3.12" % v)' \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

# The requirements alone first: a change of the code does not download torch again.
WORKDIR /workspace
COPY requirements.txt ./
RUN grep -v '^-e' requirements.txt > /tmp/pins.txt \
    && pip install --no-cache-dir --requirement /tmp/pins.txt \
    && rm /tmp/pins.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --shell /bin/bash --uid 10001 nsa \
    && mkdir -p runs \
    && chown nsa:nsa . runs

USER 10001
CMD ["python", "training/trainer.py"]
