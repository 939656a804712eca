"""Text in, fixed windows of token ids out.

``corpora`` finds the documents, ``packing`` lays their tokens end to end, ``sampling`` does so at
places that are spread over the source, ``windows`` cuts them, hashes them and keeps them on the
disk, ``split`` deals the windows to ranges and folds.
"""
