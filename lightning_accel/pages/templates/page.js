(() => {
  "use strict";
  // A point or a row leads to a run that may be folded.
  const open = () => {
    const found = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (found && found.tagName === "DETAILS") { found.open = true; found.scrollIntoView(); }
  };
  addEventListener("hashchange", open);
  addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest("a[href^='#']");
    if (link && link.getAttribute("href") === location.hash) open();
  });
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details.run")) each.open = true;
  });
  open();

  // Columns sort when their heads are clicked: numbers by their value, what is missing last.
  for (const button of document.querySelectorAll("table.sortable th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
      const place = [...head.parentNode.children].indexOf(head);
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const each of head.parentNode.children) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.children[place].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const [p, q] = [Number(x), Number(y)];
        const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
        return up ? order : -order;
      });
      body.append(...rows);
    });
  }

  // A live page asks whether something is new, and says so when nobody answers any more.
  const where = document.body.dataset.live, status = document.getElementById("live");
  if (where) {
    const known = document.body.dataset.version;
    const before = JSON.parse(sessionStorage.getItem("open") || "[]");
    for (const each of document.querySelectorAll("details.run")) {
      if (before.includes(each.dataset.name)) each.open = true;
    }
    const ask = async () => {
      try {
        const answer = await (await fetch(where, { cache: "no-store" })).json();
        if (answer.version !== known) {
          const open = [...document.querySelectorAll("details.run[open]")];
          sessionStorage.setItem("open", JSON.stringify(open.map((each) => each.dataset.name)));
          location.reload();
          return;
        }
        status.textContent = "live";
      } catch { status.textContent = "the board does not answer"; }
      setTimeout(ask, 2000);
    };
    setTimeout(ask, 2000);
  }
})();
