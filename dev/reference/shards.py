"""Token shards, as tokenizer/ writes them and dataloader.h reads them."""

import numpy as np

FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic: version, token type
HEADER_BYTES = 256 * 4


def read_shard(path):
    """Its tokens, as int64; ends the program where it is none."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] not in FORMATS:
        raise SystemExit(f"{path} is not a token shard: expected magic {' or '.join(map(str, FORMATS))}")
    version, token_type = FORMATS[header[0]]
    if header[1] != version:
        raise SystemExit(f"{path}: expected version {version}, found {header[1]}")
    tokens = np.fromfile(path, dtype=token_type, offset=HEADER_BYTES)
    if len(tokens) != header[2]:
        raise SystemExit(f"{path}: the header promises {header[2]} tokens, the file holds {len(tokens)}")
    return tokens.astype(np.int64)
