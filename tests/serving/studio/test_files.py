"""The files of the studio: nothing inline, nothing missing, nothing from another host."""

from __future__ import annotations

import json
import re
from pathlib import Path

STUDIO = Path(__file__).resolve().parents[3] / "runtimes" / "serving" / "studio"

def test_the_page_has_no_inline_code_or_style_and_every_file_is_there_and_used():
    html = (STUDIO / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=|https?://|javascript:", html) == []
    texts = {file.name: file.read_text(encoding="utf-8") for file in STUDIO.iterdir()}
    named = set(re.findall(r'(?:href|src)="studio/([^"]+)"', html)) | {"index.html"}
    for name, text in texts.items():
        named |= {found for found in re.findall(r'from "\./([^"]+)"', text) if name.endswith(".js")}
    assert named == set(texts)
    icons = set(re.findall(r'<symbol id="i-([^"]+)"', html))
    code = "".join(texts.values())
    used = set(re.findall(r'href="#i-([^"]+)"', html)) | set(re.findall(r'icon\("([^"]+)"\)', code))
    assert icons == used | {"light", "dark"}
    as_code = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(")
    assert [name for name, text in texts.items() if as_code.search(text)] == []


def test_the_policy_of_the_page_allows_no_inline_code_and_no_other_host(server, page):
    answer = page.request.get(server.url)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert json.dumps(policy).count("http") == 0 and "unsafe" not in json.dumps(policy)
