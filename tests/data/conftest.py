import functools
import http.server
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest

from data_needs import need

from memcore import data


@pytest.fixture(scope="session")
def source():
    """The real omniglot.npz."""
    path = need(data.locate, "omniglot")
    if path.suffix != ".npz":
        pytest.skip(f"omniglot is found as {path}, not as npz")
    return path


def png(pixels):
    """A PNG file of black (0) and white (1), one bit a pixel."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.insert(np.packbits(pixels, axis=1), 0, 0, axis=1)  # each row begins with its filter: none
    header = struct.pack(">2I5B", pixels.shape[1], pixels.shape[0], 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 1)) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def zips(source, tmp_path_factory):
    """A folder with images_background.zip and images_evaluation.zip, all drawings as PNG, as their publisher packs them."""
    pytest.importorskip("PIL.Image", reason="Pillow is not installed: no PNG can be read")
    folder = tmp_path_factory.mktemp("zips")
    with np.load(source) as z:
        bits, alphabet, names = z["bits"], z["char_alphabet"], z["alphabet_names"]
    inside = np.zeros(len(names), int)
    parts = {n: zipfile.ZipFile(folder / f"images_{n}.zip", "w") for n in ("background", "evaluation")}
    for character in range(1623):
        part = "background" if character < 964 else "evaluation"
        home = names[alphabet[character]]
        inside[alphabet[character]] += 1
        for drawing in range(20):
            ink = np.unpackbits(bits[character * 20 + drawing], count=105 * 105).reshape(105, 105)
            name = f"images_{part}/{home}/character{inside[alphabet[character]]:02}/{character + 1:04}_{drawing + 1:02}.png"
            parts[part].writestr(name, png(1 - ink))
    for part in parts.values():
        part.close()
    return folder


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.asked.append(self.path)


@pytest.fixture
def serve():
    """serve(folder) -> (address, list of requests so far): a loopback server."""
    servers = []

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no other place to search."""
    monkeypatch.delenv("MEMCORE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "memcore"
