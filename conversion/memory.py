"""Weights that are read from the disk when they are used need not stay in memory."""

import ctypes
import mmap
import sys

import torch


MADV_PAGEOUT = 21  # of Linux, since 5.4


def page_out(tensor: torch.Tensor):
    """
    Lets the system take the memory of a tensor that is not used for now; what the tensor holds is read again from its
    file when it is. Where the system knows no such request, nothing happens.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    # Whole pages
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
