from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = (here / "improved_diffusion" / "_version.py").read_text().split('"')[1]

test = ["pytest>=8", "pytest-timeout>=2", "ruff>=0.9", "mypy>=1.10"]
mpi = ["mpich>=4.2"]
tensorboard = ["tensorboard>=2.10"]
demo = ["scikit-learn>=1.3"]
lsun = ["lmdb>=1.4"]
scientific = ["tifffile>=2023.1.23", "imagecodecs>=2023.1.23"]
webdataset = ["webdataset>=1.0"]
ode = ["scipy>=1.10"]
plots = ["matplotlib>=3.7"]
safetensors = ["safetensors>=0.4"]
diffusers = ["diffusers>=0.30", *safetensors]

setup(
    name="improved-diffusion",
    version=version,
    description="Train diffusion models on images and sample from them: DDPM, DDIM, IDDPM",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["improved_diffusion", "improved_diffusion.*"]),
    package_data={"improved_diffusion": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.24",
        "blobfile>=1.0.5",
        "mpi4py>=3.1",
        "tqdm>=4.60",
        "pillow>=9.4",
    ],
    extras_require={
        "test": [
            *test,
            *mpi,
            *tensorboard,
            *demo,
            *lsun,
            *scientific,
            *webdataset,
            *ode,
            *plots,
            *diffusers,
        ],
        "mpi": mpi,
        "tensorboard": tensorboard,
        "demo": demo,
        "lsun": lsun,
        "scientific": scientific,
        "webdataset": webdataset,
        "ode": ode,
        "plots": plots,
        "safetensors": safetensors,
        "diffusers": diffusers,
    },
)
