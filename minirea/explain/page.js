"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const buttons = Array.from(document.querySelectorAll("#answer span"));
  const map = document.getElementById("map");
  const BINS = 300;
  let shaded = [];

  /* Position -> share, of one token of the answer or of all of them (null). */
  function used(chosen) {
    const sums = new Map();
    data.used.forEach(function (pair, token) {
      if (chosen !== null && token !== chosen) return;
      pair[0].forEach(function (position, i) {
        sums.set(position, (sums.get(position) || 0) + pair[1][i]);
      });
    });
    return sums;
  }

  function show(chosen) {
    const sums = used(chosen);
    let most = 0;
    sums.forEach(function (share) { most = Math.max(most, share); });
    shaded.forEach(function (span) { span.style.removeProperty("--w"); span.removeAttribute("title"); });
    shaded = [];
    const bins = new Array(BINS).fill(0);
    sums.forEach(function (share, position) {
      bins[Math.min(BINS - 1, Math.floor(position * BINS / data.tokens))] += share;
      const span = document.getElementById("t" + position);
      if (!span) return;
      span.style.setProperty("--w", Math.sqrt(share / most).toFixed(3));
      span.title = "token " + position + ": " + (100 * share).toFixed(2) + " %";
      shaded.push(span);
    });
    const highest = Math.max.apply(null, bins);
    map.replaceChildren();
    bins.forEach(function (share, i) {
      if (!share) return;
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = Math.max(2, 30 * Math.sqrt(share / highest));
      const box = { x: i, y: 30 - height, width: 1.2, height: height };
      Object.keys(box).forEach(function (name) { rect.setAttribute(name, box[name]); });
      map.appendChild(rect);
    });
    buttons.forEach(function (button, token) {
      button.setAttribute("aria-pressed", String(token === chosen));
    });
    const words = document.getElementById("chosen");
    words.textContent = chosen === null
      ? "Shaded: what the whole answer used. Choose one of its tokens to see what that one used."
      : "Shaded: what token " + (chosen + 1) + " of the answer used. Choose it again for the whole answer.";
    return sums;
  }

  function goTo(position) {
    let nearest = null;
    document.querySelectorAll(".text").forEach(function (part) {
      const start = Number(part.dataset.start), end = Number(part.dataset.end);
      const away = position < start ? start - position : position >= end ? position - end + 1 : 0;
      if (nearest === null || away < nearest.away) {
        nearest = { away: away, at: Math.min(Math.max(position, start), end - 1) };
      }
    });
    const span = nearest && document.getElementById("t" + nearest.at);
    if (span) span.scrollIntoView({ block: "center" });
  }

  let current = null;
  function choose(token) {
    current = token === current ? null : token;
    const sums = show(current);
    if (current === null) return;
    let best = null;
    sums.forEach(function (share, position) {
      if (best === null || share > sums.get(best)) best = position;
    });
    if (best !== null) goTo(best);
  }

  buttons.forEach(function (button, token) {
    button.addEventListener("click", function () {
      if (document.getSelection().isCollapsed) choose(token);  /* else the text is being copied */
    });
    button.addEventListener("keydown", function (event) {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(token);
    });
  });
  map.addEventListener("click", function (event) {
    const box = map.getBoundingClientRect();
    goTo(Math.floor((event.clientX - box.left) / box.width * data.tokens));
  });
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape" && current !== null) choose(current);
  });
  /* page.html#a3 opens with the answer's token 3 (from 0) chosen. */
  const asked = /^#a(\d+)$/.exec(location.hash);
  if (asked && Number(asked[1]) < buttons.length) choose(Number(asked[1]));
  else show(null);
  document.documentElement.dataset.ready = "true";
})();
