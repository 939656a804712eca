// The search of a site that is opened from the file system: there browsers start no worker, so
// it runs in a frame. The theme looks for the name IFrameWorker.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = url
      this.ready = new Promise(resolve => { script.onload = resolve })
      this.postMessage = data =>
        this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
      inside.document.head.append(script)
    }
  }
}
