"""The Dask dashboard of a host behind ssh, seen in a real browser through the tunnel."""
import json

import pytest

from labs import HOSTS, need
from far import BEGIN, CLUSTERS, DASKSERVER

pytestmark = pytest.mark.browser

SHOW = BEGIN + """
from seamless_lite import config
where(1)
with open("link.new", "w") as file:
    file.write(config.dashboard_link())
os.rename("link.new", "link")
while not os.path.exists("seen"):
    time.sleep(0.05)
"""


def test_the_dashboard_is_seen_in_a_browser_through_the_tunnel_and_only_with_its_link(netns_dask, lab_user):
    need("bokeh", "tornado", program="chromium")
    user = lab_user(netns_dask)
    user.configure(CLUSTERS, DASKSERVER)
    netns_dask("firewall", "h1", "--allow", "22")               # nothing but ssh reaches that host
    running = user.start_python(SHOW)
    running.until((user.work / "link").exists, "it wrote the link")
    link = (user.work / "link").read_text()
    assert link.startswith("http://127.0.0.1:")
    seen = json.loads(user.run(user.python_exe, HOSTS.parent / "browse.py", link, user.work / "page.png").ok())
    assert seen["title"].startswith("Dask") and {"Task Stream", "Progress"} <= set(seen["plots"])
    assert (user.work / "page.png").stat().st_size > 5000
    root = link.split("/", 3)[:3]
    look = user.python("""
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=10).status)
except urllib.error.HTTPError as exc:
    print(exc.code)
""", "/".join(root + ["status"]))
    assert look.ok().strip() in ("403", "404")                  # without the token in the link there is nothing to see
    (user.work / "seen").touch()
    running.finish(30).ok()
