"""Look at a page with a real browser: ``browse.py URL FILE.png`` prints the page's title and the titles of its live plots.

Run as a program, because the browser has to run where the page can be reached.  It drives a headless chromium through
its debugging port, with the websocket client of tornado (which comes with distributed).  Plots count only when
the page's own websocket has brought them, so a page that merely loaded is not enough.
"""
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import urllib.request

from tornado.websocket import websocket_connect

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-default-apps", "--disable-sync", "--no-first-run", "--remote-debugging-port=0", "--window-size=1400,900"]
TITLES = """
(() => {
    if (!window.Bokeh || !Bokeh.documents.length) return null;
    const titles = [];
    for (const document of Bokeh.documents)
        for (const model of document._all_models.values())
            if (model.type === "Figure" && model.title) titles.push(model.title.text);
    return titles;
})()
"""


async def look(link, picture, folder):
    port_file = os.path.join(folder, "DevToolsActivePort")
    while not os.path.exists(port_file) or len(open(port_file).read().split()) < 2:
        await asyncio.sleep(0.05)
    port = open(port_file).read().split()[0]
    with urllib.request.urlopen("http://127.0.0.1:%s/json/list" % port) as answer:
        page = next(target for target in json.load(answer) if target["type"] == "page")
    socket = await websocket_connect(page["webSocketDebuggerUrl"], max_message_size=1 << 26)
    numbers = iter(range(1, 1 << 20))

    async def ask(method, **params):
        number = next(numbers)
        await socket.write_message(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(await socket.read_message())
            if message.get("id") == number:
                return message["result"]

    async def evaluate(code):
        return (await ask("Runtime.evaluate", expression=code, returnByValue=True))["result"].get("value")

    await ask("Page.navigate", url=link)
    titles = None
    while not titles:
        await asyncio.sleep(0.2)
        titles = await evaluate(TITLES)
    await asyncio.sleep(1)                                      # let the plots be drawn, for the picture
    with open(picture, "wb") as file:
        file.write(base64.b64decode((await ask("Page.captureScreenshot"))["data"]))
    print(json.dumps({"title": await evaluate("document.title"), "plots": titles}))
    socket.close()


def main():
    link, picture = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as folder:
        browser = subprocess.Popen(["chromium", *FLAGS, "--user-data-dir=" + folder, "about:blank"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            asyncio.run(asyncio.wait_for(look(link, picture, folder), 30))
        finally:
            browser.terminate()
            browser.wait(10)


if __name__ == "__main__":
    main()
