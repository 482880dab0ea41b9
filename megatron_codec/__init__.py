"""Language models that write JPEG and H.264 files byte by byte, pretrained on Megatron-Core.

The way of the data, and the order in which to read the package:
codecs -> tokenizer -> data -> preprocessing -> model -> training -> inference -> evaluation.
"""

__version__ = "0.1.0"
